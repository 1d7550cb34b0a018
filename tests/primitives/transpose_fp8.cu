// V^T of one block of bytes by two warps, and four conversions to E4M3 by every thread.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/float8.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/transpose_fp8.cuh>

using namespace cutlass_fa;

constexpr int kKeys = 64;
constexpr int kColumns = 64;
constexpr int kSwizzleBytes = 64;
constexpr int kRowsBytes = 4096;  // of the block as it lands, whose last chunk may be partly used

struct SharedStorage {
  alignas(1024) uint32_t rows[kRowsBytes / 4];
  alignas(1024) uint32_t columns[kKeys * kColumns / 4];
};

struct Params {
  uint32_t const* rows;    // [kRowsBytes / 4], as it lies in shared memory
  uint32_t* columns;       // [kKeys * kColumns / 4], as it lies in shared memory
  float const* numbers;    // [64 threads][4]
  uint32_t* packed;        // [64 threads]
};

extern "C" __global__ void __launch_bounds__(64, 1) transpose_fp8(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  int const thread = thread_index();
  for (int i = thread; i < kRowsBytes / 4; i += 64) { shared.rows[i] = params.rows[i]; }
  block_sync();
  int const warp = thread / kWarpSize;
  transpose_block<kKeys, kColumns, kSwizzleBytes>(reinterpret_cast<char const*>(shared.rows), reinterpret_cast<char*>(shared.columns),
                                                  warp * (kColumns / 2), (warp + 1) * (kColumns / 2));
  block_sync();
  for (int i = thread; i < kKeys * kColumns / 4; i += 64) { params.columns[i] = shared.columns[i]; }
  float const* const x = params.numbers + 4 * thread;
  params.packed[thread] = pack4_e4m3(x[0], x[1], x[2], x[3]);
}
