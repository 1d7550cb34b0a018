// Tiles of 16 rows go round a ring of buffers in both CTAs of a cluster: each CTA loads one half of every tile and multicasts it to both,
// and both CTAs' consumers tell both producers when a buffer is free. What a clustered forward does with its keys and values.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cluster.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma_multicast.cuh>
#include <cutlass_fa/warp.cuh>

using namespace cutlass_fa;

constexpr int kClusterCtas = 2;
constexpr int kStages = 2;
constexpr int kHalfBytes = 8 * 64;  // 8 rows of 32 16-bit elements
constexpr int kConsumerWarps = 2;   // each reads one half
constexpr bool kExchange = true;    // of sums between the CTAs in the end; otherwise the producer waits for the last arrivals
// Faults.
constexpr bool kSyncStart = true;
constexpr bool kFenceInit = true;
constexpr bool kWaitFull = true;
constexpr bool kWaitEmpty = true;
constexpr bool kArriveRemotely = true;
constexpr bool kSyncExchange = true;
constexpr bool kSyncEnd = true;
constexpr bool kWaitTail = true;
constexpr int kExpected = 2 * kHalfBytes;
constexpr int kMask = 3;
constexpr bool kOwnOnly = false;
constexpr int kFarthest = 1;  // rank
constexpr bool kWaitAlone = false;
constexpr bool kArriveTwice = false;
constexpr bool kLeaveEarly = false;

struct SharedStorage {
  alignas(128) char tile[kStages][2][kHalfBytes];
  uint32_t sums[kConsumerWarps][32][4];
  Mbarrier full[kStages];
  Mbarrier empty[kStages];
};

struct Params {
  uint32_t* out;  // [CTAs][kConsumerWarps][32 lanes][4]
  int steps;
};

CUTLASS_FA_DEVICE void start(SharedStorage& shared) {
  if (thread_index() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(kClusterCtas * kConsumerWarps);
    }
    if constexpr (kFenceInit) { fence_mbarrier_init(); }
  }
  if constexpr (kSyncStart) {
    cluster_sync();
  } else {
    block_sync();
  }
}

CUTLASS_FA_DEVICE void produce(SharedStorage& shared, TensorMap const& map, Params const& params) {
  int const half = cluster_rank();
  PipelineState<kStages> pipe;
  for (int step = 0; step < params.steps; ++step, pipe.advance()) {
    if constexpr (kWaitEmpty) { shared.empty[pipe.stage()].wait(pipe.parity() ^ 1); }
    shared.full[pipe.stage()].arrive_and_expect(kExpected);
    uint16_t const mask = kOwnOnly ? 1 << half : kMask;
    tma_load_multicast(map, shared.full[pipe.stage()], mask, CacheHint::kEvictLast, shared.tile[pipe.stage()][half], 0, 16 * step + 8 * half,
                       block_index() / kClusterCtas, 0);
  }
  for (int stage = 0; stage < kStages && !kExchange && kWaitTail; ++stage, pipe.advance()) {
    shared.empty[pipe.stage()].wait(pipe.parity() ^ 1);
  }
}

CUTLASS_FA_DEVICE void release(Mbarrier& empty) {
  warp_sync();
  if (thread_index() % kWarpSize != 0) { return; }
  if constexpr (kArriveRemotely) {
    for (int rank = 0; rank <= kFarthest; ++rank) { remote_arrive(empty, rank); }
  } else {
    empty.arrive();
    empty.arrive();
  }
}

CUTLASS_FA_DEVICE void consume(SharedStorage& shared, Params const& params, int warp, uint32_t (&sums)[4]) {
  int const lane = thread_index() % kWarpSize;
  PipelineState<kStages> pipe;
  for (int step = 0; step < params.steps; ++step, pipe.advance()) {
    if constexpr (kWaitFull) { shared.full[pipe.stage()].wait(pipe.parity()); }
    uint32_t words[4];
    load_matrix_x4(words, shared.tile[pipe.stage()][warp] + lane % 8 * 64 + lane / 8 * 16);
    for (int j = 0; j < 4; ++j) { sums[j] = 3 * sums[j] + words[j]; }
    release(shared.empty[pipe.stage()]);
  }
}

// Adds five times the other CTA's sums.
CUTLASS_FA_DEVICE void exchange(SharedStorage& shared, int warp, uint32_t (&sums)[4]) {
  int const lane = thread_index() % kWarpSize;
  if (warp >= 0) {
    for (int j = 0; j < 4; ++j) { shared.sums[warp][lane][j] = sums[j]; }
  }
  if constexpr (kSyncExchange) { cluster_sync(); }  // the other CTA has written its sums
  if (warp >= 0) {
    for (int j = 0; j < 4; ++j) { sums[j] += 5 * remote_load(&shared.sums[warp][lane][j], cluster_rank() ^ 1); }
  }
  if constexpr (kSyncEnd) { cluster_sync(); }  // the other CTA has read this one's
}

extern "C" __global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(96, 1)
    cluster_ring(const __grid_constant__ TensorMap map, const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  start(shared);
  if constexpr (kWaitAlone) { cluster_wait(); }
  if constexpr (kArriveTwice) { cluster_arrive(); cluster_arrive(); }
  int const warp = thread_index() / kWarpSize - 1;  // of the consumers
  uint32_t sums[4];
  for (int j = 0; j < 4; ++j) { sums[j] = static_cast<uint32_t>(cluster_rank() + cluster_size() * j); }
  if (warp >= 0) {
    consume(shared, params, warp, sums);
  } else if (thread_index() == 0) {
    produce(shared, map, params);
  }
  if constexpr (kExchange) { exchange(shared, warp, sums); }
  if (warp >= 0) {
    uint32_t* const out = params.out + ((block_index() * kConsumerWarps + warp) * kWarpSize + thread_index() % kWarpSize) * 4;
    for (int j = 0; j < 4; ++j) { out[j] = sums[j]; }
  }
  if constexpr (kLeaveEarly) { cluster_arrive(); }
}
