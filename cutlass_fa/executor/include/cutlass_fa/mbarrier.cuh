// SPDX-License-Identifier: BSD-3-Clause
// Host twin of mbarrier.cuh. The runtime keeps the counts; the word in shared memory holds a pattern that shows when it is overwritten.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/pipeline.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

struct Mbarrier {
  uint64_t state;

  CUTLASS_FA_DEVICE void init(uint32_t arrivals, CUTLASS_FA_SITE) { executor::mbarrier_init(&state, arrivals, site); }

  CUTLASS_FA_DEVICE void arrive(CUTLASS_FA_SITE) { executor::mbarrier_arrive(&state, site); }

  CUTLASS_FA_DEVICE void arrive_and_expect(uint32_t bytes, CUTLASS_FA_SITE) { executor::mbarrier_arrive_and_expect(&state, bytes, site); }

  CUTLASS_FA_DEVICE void wait(uint32_t parity, CUTLASS_FA_SITE) { executor::mbarrier_wait(&state, parity, site); }
};

CUTLASS_FA_DEVICE void fence_mbarrier_init(CUTLASS_FA_SITE) { executor::mbarrier_fence_init(site); }

}  // namespace cutlass_fa
