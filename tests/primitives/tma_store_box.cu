// Two boxes through one buffer of shared memory to a tensor, one below the other; as reductions, both to the same place.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/proxy_fence.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma_store.cuh>

using namespace cutlass_fa;

constexpr int kWords = 1024;  // of a box
constexpr bool kAdds = false;
constexpr bool kFlat = false;  // a reduction of consecutive floats, coordinate[0] of them on
constexpr bool kCopies = false;  // the buffer is filled by cp.async
constexpr int kRowsApart = 16;
constexpr int kTurns = 2;
// Faults.
constexpr bool kFence = true;
constexpr bool kWaitRead = true;
constexpr bool kCommit = true;
constexpr int kShift = 0;  // bytes
constexpr int kWritten = kWords;

struct SharedStorage {
  alignas(1024) uint32_t box[kWords];
};

struct Params {
  uint32_t const* in;  // [2][kWords], as they shall lie in shared memory
  uint32_t* out;
  uint32_t* seen;  // what the storing thread reads at out[where] after its wait
  int coordinate[4];
  int where;
};

extern "C" __global__ void __launch_bounds__(128, 1)
    tma_store_box(const __grid_constant__ TensorMap map, const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  int const* const at = params.coordinate;
  for (int turn = 0; turn < kTurns; ++turn) {
    if constexpr (kCopies) {
      for (int word = thread_index() * 4; word < kWords; word += 512) { cp_async(&shared.box[word], &params.in[turn * kWords + word]); }
      cp_async_wait_all();
    } else {
      for (int word = thread_index(); word < kWritten; word += 128) { shared.box[word] = params.in[turn * kWords + word]; }
    }
    if constexpr (kFence) { fence_async_proxy(); }
    block_sync();
    if (thread_index() == 0) {
      char const* const source = reinterpret_cast<char const*>(shared.box) + kShift;
      if constexpr (kFlat) {
        bulk_reduce_add(reinterpret_cast<float*>(params.out) + at[0], source, kWords * 4);
      } else if constexpr (kAdds) {
        tma_reduce_add(map, source, at[0], at[1], at[2], at[3]);
      } else {
        tma_store(map, source, at[0], at[1] + turn * kRowsApart, at[2], at[3]);
      }
      if constexpr (kCommit) { tma_store_commit(); }
      if constexpr (kWaitRead) { tma_store_wait_read<0>(); }
    }
    block_sync();
  }
  if (thread_index() == 0) {
    tma_store_wait<0>();
    params.seen[0] = *static_cast<uint32_t const volatile*>(params.out + params.where);
  }
}
