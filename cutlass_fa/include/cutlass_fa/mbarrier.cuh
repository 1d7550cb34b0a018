// SPDX-License-Identifier: BSD-3-Clause
// mbarrier: a counter in shared memory that threads arrive at, that asynchronous copies report their bytes to, and that threads wait for.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// A phase ends when `arrivals` threads have arrived and every expected byte has landed. Phases alternate between parity 0 and 1.
struct Mbarrier {
  uint64_t state;

  CUTLASS_FA_DEVICE void init(uint32_t arrivals) { cutlass::arch::ClusterBarrier::init(&state, arrivals); }

  CUTLASS_FA_DEVICE void arrive() { cutlass::arch::ClusterBarrier::arrive(&state); }

  // Arrive, and hold the phase open until `bytes` more have been written by asynchronous copies.
  CUTLASS_FA_DEVICE void arrive_and_expect(uint32_t bytes) { cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&state, bytes); }

  // Until the phase of this parity has ended. A fresh barrier counts as having ended parity 1.
  CUTLASS_FA_DEVICE void wait(uint32_t parity) { cutlass::arch::ClusterBarrier::wait(&state, parity); }
};

// Makes initialised barriers visible to the copy engine; the initialising thread calls it before the CTA's first barrier.
CUTLASS_FA_DEVICE void fence_mbarrier_init() { cutlass::arch::fence_barrier_init(); }

// Which stage of a ring comes next, and the parity of the phase that fills it.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  CUTLASS_FA_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace cutlass_fa
