// Tiles of 8 rows go round a ring of two buffers, brought by one warp's cp.asyncs whose landing an mbarrier shows; another warp reads them.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async_mbarrier.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/warp.cuh>

using namespace cutlass_fa;

constexpr int kStages = 2;
constexpr int kTileBytes = 8 * 64;  // 8 rows of 32 16-bit elements
// Faults.
constexpr int kArrivals = 32;
constexpr bool kArrive = true;
constexpr bool kArriveFirst = false;
constexpr bool kArrivePlainly = false;
constexpr bool kWaitFull = true;
constexpr bool kWaitEmpty = true;

struct SharedStorage {
  alignas(128) char tile[kStages][kTileBytes];
  Mbarrier full[kStages];
  Mbarrier empty[kStages];
};

struct Params {
  char const* tiles;  // [steps][kTileBytes]
  uint32_t* out;      // [32 lanes][4]
  int steps;
};

CUTLASS_FA_DEVICE void produce(SharedStorage& shared, Params const& params, int lane) {
  PipelineState<kStages> pipe;
  for (int step = 0; step < params.steps; ++step, pipe.advance()) {
    if constexpr (kWaitEmpty) { shared.empty[pipe.stage()].wait(pipe.parity() ^ 1); }
    if constexpr (kArriveFirst) { cp_async_mbarrier_arrive(shared.full[pipe.stage()]); }
    cp_async(shared.tile[pipe.stage()] + 16 * lane, params.tiles + step * kTileBytes + 16 * lane);
    if constexpr (kArrivePlainly) { shared.full[pipe.stage()].arrive(); }
    if constexpr (kArrive && !kArriveFirst && !kArrivePlainly) { cp_async_mbarrier_arrive(shared.full[pipe.stage()]); }
  }
}

CUTLASS_FA_DEVICE void consume(SharedStorage& shared, Params const& params, int lane) {
  uint32_t sums[4] = {1, 2, 3, 4};
  PipelineState<kStages> pipe;
  for (int step = 0; step < params.steps; ++step, pipe.advance()) {
    if constexpr (kWaitFull) { shared.full[pipe.stage()].wait(pipe.parity()); }
    uint32_t words[4];
    load_matrix_x4(words, shared.tile[pipe.stage()] + lane % 8 * 64 + lane / 8 * 16);
    for (int j = 0; j < 4; ++j) { sums[j] = 3 * sums[j] + words[j]; }
    warp_sync();
    if (lane == 0) { shared.empty[pipe.stage()].arrive(); }
  }
  for (int j = 0; j < 4; ++j) { params.out[4 * lane + j] = sums[j]; }
}

extern "C" __global__ void __launch_bounds__(64, 1) cp_async_ring(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  if (thread_index() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      shared.full[stage].init(kArrivals);
      shared.empty[stage].init(1);
    }
  }
  block_sync();
  int const lane = thread_index() % kWarpSize;
  if (thread_index() < kWarpSize) {
    produce(shared, params, lane);
  } else {
    consume(shared, params, lane);
  }
}
