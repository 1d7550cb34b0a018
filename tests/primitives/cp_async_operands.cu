// D (64, 64) = A B^T by one warpgroup, A and B (64, 64) brought by cp.async to where 128-byte swizzled TMA boxes would put them: what a
// paged key-value cache needs whose pages are smaller than a tile.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/cp_async_mbarrier.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/proxy_fence.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/wgmma.cuh>

using namespace cutlass_fa;

constexpr uint64_t kLayout = 0;
constexpr bool kByMbarrier = false;  // the copies arrive at an mbarrier; otherwise each thread waits for its own
// Faults.
constexpr bool kWait = true;
constexpr bool kFence = true;
constexpr bool kSync = true;

struct SharedStorage {
  alignas(1024) char a[8192];
  alignas(1024) char b[8192];
  Mbarrier full;
};

struct Params {
  char const* a;
  char const* b;
  float* d;  // [128 threads][32]
};

CUTLASS_FA_DEVICE void load_tile(char* tile, char const* source) {
  for (int offset = thread_index() * 16; offset < 8192; offset += 128 * 16) {
    cp_async(tile + (offset ^ (offset >> 3 & 0x70)), source + offset);
  }
}

extern "C" __global__ void __launch_bounds__(128, 1) cp_async_operands(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  if (kByMbarrier && thread_index() == 0) { shared.full.init(128); }
  if constexpr (kByMbarrier) { block_sync(); }
  load_tile(shared.a, params.a);
  load_tile(shared.b, params.b);
  if constexpr (kByMbarrier) {
    cp_async_mbarrier_arrive(shared.full);
    if constexpr (kWait) { shared.full.wait(0); }
    if constexpr (kFence) { fence_async_proxy(); }
  } else {
    cp_async_commit();
    if constexpr (kWait) { cp_async_wait<0>(); }
    if constexpr (kFence) { fence_async_proxy(); }
    if constexpr (kSync) { block_sync(); }
  }
  float acc[32];
  pin_registers(acc);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wgmma_ss<bfloat16, Major::kK>(acc, advance_descriptor(matrix_descriptor(kLayout, shared.a), 32 * step),
                                  advance_descriptor(matrix_descriptor(kLayout, shared.b), 32 * step), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(acc);
  for (int i = 0; i < 32; ++i) { params.d[thread_index() * 32 + i] = acc[i]; }
}
