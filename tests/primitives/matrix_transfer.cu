// ldmatrix and stmatrix: each of two warps loads matrices that the other one wrote, stores its words again, and loads the other one's.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/stmatrix.cuh>

using namespace cutlass_fa;

constexpr int kMatrices = 4;
constexpr bool kTransposedLoad = false;
constexpr bool kTransposedStore = false;
constexpr bool kStore = true;  // false for GPUs without stmatrix
// Faults.
constexpr int kShift = 0;  // bytes
constexpr int kWritten = 32;  // lanes that write their row
constexpr int kStorers = 32;
constexpr bool kSyncStored = true;
constexpr bool kInPlace = false;

struct SharedStorage {
  alignas(1024) uint32_t in[2][32][4];
  alignas(1024) uint32_t out[2][32][4];
};

struct Params {
  uint32_t const* in;  // [2 warps][32 rows][4]
  uint32_t* loaded;    // [2 warps][32 lanes][4], of which kMatrices are written
  uint32_t* out;       // [2 warps][8 kMatrices rows][4]
  uint32_t* again;     // as loaded: what the other warp loads from out
};

CUTLASS_FA_DEVICE void load(uint32_t (&words)[4], void const* row) {
  kTransposedLoad ? load_matrix_x4_transposed(words, row) : load_matrix_x4(words, row);
}
CUTLASS_FA_DEVICE void load(uint32_t (&words)[2], void const* row) {
  kTransposedLoad ? load_matrix_x2_transposed(words, row) : load_matrix_x2(words, row);
}

CUTLASS_FA_DEVICE void store(void* row, uint32_t const (&words)[4]) {
  kTransposedStore ? store_matrix_x4_transposed(row, words) : store_matrix_x4(row, words);
}
CUTLASS_FA_DEVICE void store(void* row, uint32_t const (&words)[2]) {
  kTransposedStore ? store_matrix_x2_transposed(row, words) : store_matrix_x2(row, words);
}

extern "C" __global__ void __launch_bounds__(64, 1) matrix_transfer(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  int const warp = thread_index() / 32;
  int const lane = thread_index() % 32;
  if (lane < kWritten) {
    for (int i = 0; i < 4; ++i) { shared.in[1 - warp][lane][i] = params.in[((1 - warp) * 32 + lane) * 4 + i]; }
  }
  block_sync();
  uint32_t words[kMatrices];
  load(words, reinterpret_cast<char const*>(shared.in[warp][lane]) + kShift);
  for (int i = 0; i < kMatrices; ++i) { params.loaded[(warp * 32 + lane) * 4 + i] = words[i]; }
  if constexpr (kStore) {
    if (lane < kStorers) { store(kInPlace ? shared.in[1 - warp][lane] : shared.out[warp][lane], words); }
    if constexpr (kSyncStored) { block_sync(); }
    load(words, shared.out[1 - warp][lane]);
    for (int i = 0; i < kMatrices; ++i) { params.again[(warp * 32 + lane) * 4 + i] = words[i]; }
    if (lane < 8 * kMatrices) {
      for (int i = 0; i < 4; ++i) { params.out[((1 - warp) * 8 * kMatrices + lane) * 4 + i] = shared.out[1 - warp][lane][i]; }
    }
  }
}
