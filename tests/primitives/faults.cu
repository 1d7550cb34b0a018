// Things that a kernel must not do, one for each number. 512 threads.
#include <cutlass_fa/atomic.cuh>
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/named_barrier.cuh>
#include <cutlass_fa/registers.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/warp.cuh>

using namespace cutlass_fa;

struct SharedStorage {
  alignas(1024) Mbarrier barrier[4];
};

struct Params {
  int* out;  // 512 numbers
  int which;
};

CUTLASS_FA_DEVICE void misuse_barriers(SharedStorage& shared, int which, int thread) {
  Mbarrier& barrier = shared.barrier[0];
  if (which == 0) { named_barrier_sync(3, thread < 128 ? 256 : 128); }
  if (which == 1 && thread < 32) {
    named_barrier_arrive(3, 64);
    named_barrier_arrive(3, 64);
  }
  if (which == 2 && thread < 128) { named_barrier_sync(3, 256); }
  if (which == 3 && thread == 0) {
    barrier.init(1);
    barrier.arrive_and_expect(64);
    barrier.arrive();
  }
  if (which == 4) { barrier.wait(0); }
  if (which == 5) {
    if (thread == 0) { barrier.init(1); }
    if (thread == 1) { barrier.wait(0); }
  }
  if (which == 6) {
    if (thread == 0) { barrier.init(2); }
    block_sync();
    if (thread == 0) { barrier.arrive(); }
    if (thread > 200) { barrier.wait(0); }
  }
  if (which == 7 && thread < 200) { block_sync(); }
  if (which == 8) { named_barrier_sync(15, 512); }
  if (which == 9 && thread == 0) {
    barrier.init(1);
    barrier.init(2);
  }
  if (which == 10 && thread == 0) {
    barrier.init(1);
    shared.barrier[0].state = 5;
    barrier.arrive();
  }
}

CUTLASS_FA_DEVICE int misuse_warps(int which, int thread) {
  if (which == 20 && thread % 32 < 16) { return shuffle_xor(thread, 1); }
  if (which == 21) {
    if (thread % 32 < 16) { return shuffle_xor(thread, 1); }
    warp_sync();
  }
  if (which == 22 && thread < 128) { grow_registers_to<256>(); }
  if (which == 23 && thread < 128) { shrink_registers_to<32>(); }
  return thread;
}

CUTLASS_FA_DEVICE void misuse_memory(Params const& params, int which, int thread) {
  int numbers[8] = {};
  if (which == 40) { params.out[thread + 1] = thread; }
  if (which == 41) { params.out[thread - 1] = thread; }
  if (which == 42) { params.out[0] = numbers[thread]; }
  if (which == 43) { atomic_add(params.out + 512, 1); }
  if (which == 44) {
    while (grid_size() == 1) { block_sync(); }
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) faults(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  int const thread = thread_index();
  misuse_barriers(shared, params.which, thread);
  int const value = misuse_warps(params.which, thread);
  misuse_memory(params, params.which, thread);
  if (params.which == 99) { params.out[thread] = value; }
}
