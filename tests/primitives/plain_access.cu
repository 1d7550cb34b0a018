// Plain loads and stores of shared memory that a kernel must not make, one for each number; 14, 16 and 99 are those that it may. 64 threads.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/named_barrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/stmatrix.cuh>
#include <cutlass_fa/warp.cuh>

using namespace cutlass_fa;

struct SharedStorage {
  alignas(1024) uint32_t word[256];
  uint16_t half[64];
  Mbarrier barrier;
};

struct Params {
  uint32_t* out;       // 64 numbers
  uint32_t const* in;  // 256
  int which;
};

// Two accesses of a word by different threads, and what stands between them.
CUTLASS_FA_DEVICE uint32_t race(SharedStorage& shared, int which, int thread) {
  uint32_t const value = static_cast<uint32_t>(thread);
  if (which == 1) { shared.word[thread / 2] = value; }
  if (which == 2) {
    shared.word[thread] = value;
    return shared.word[thread ^ 1];
  }
  if (which == 3) {
    shared.word[thread] = value;
    shuffle_xor(value, 1);  // orders no memory
    return shared.word[thread ^ 1];
  }
  if (which == 4) {
    shared.word[thread] = value;
    warp_sync();
    return shared.word[thread ^ 32];  // of the other warp
  }
  if (which == 5) {
    shared.word[thread] = value;
    block_sync();
    uint32_t const other = shared.word[thread ^ 1];
    shared.word[thread] = 0;
    return other;
  }
  return value;
}

CUTLASS_FA_DEVICE uint32_t unready(SharedStorage& shared, Params const& params, int which, int thread) {
  if (which == 10) { return shared.word[thread]; }
  if (which >= 11 && which <= 13) {
    cp_async(&shared.word[4 * thread], params.in + 4 * thread);
    if (which == 11) { shared.word[4 * thread] = 0; }
    if (which == 13) { cp_async_wait_all(); }
    return shared.word[which == 13 ? thread : 4 * thread];
  }
  if (which >= 14 && which <= 16 && thread < 32) {
    uint32_t words[4] = {1, 2, 3, 4};
    if (which == 14) {
      store_matrix_x4(&shared.word[4 * thread], words);
      return shared.word[4 * (thread ^ 1)];
    }
    for (int j = 0; j < 4; ++j) { shared.word[4 * thread + j] = words[j]; }
    if (which == 16) { warp_sync(); }
    load_matrix_x4(words, &shared.word[4 * thread]);
    if (which == 16 && thread == 0) { shared.word[20] = 1; }
  }
  return 0;
}

// Every way to order two accesses.
CUTLASS_FA_DEVICE uint32_t in_order(SharedStorage& shared, int thread) {
  shared.half[thread] = static_cast<uint16_t>(thread);  // neighbours in a word
  shared.word[thread] = 1;
  warp_sync();
  uint32_t sum = shared.word[thread ^ 1];
  block_sync();
  shared.word[thread ^ 1] = 2;
  if (thread < 32) { shared.barrier.arrive(); }
  if (thread >= 32) {
    shared.barrier.wait(0);
    sum += shared.word[thread - 32] + shared.half[thread - 32];
    named_barrier_arrive(1, 64);
  } else {
    named_barrier_sync(1, 64);
    shared.word[thread] = 5;
    sum += shared.word[thread] + shared.half[thread + 32];
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(64, 1) plain_access(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  int const thread = thread_index();
  if (thread == 0) { shared.barrier.init(32); }
  block_sync();
  uint32_t value = race(shared, params.which, thread) + unready(shared, params, params.which, thread);
  if (params.which == 99) { value = in_order(shared, thread); }
  params.out[thread] = value;
}
