// SPDX-License-Identifier: BSD-3-Clause
// cp.async whose landing an mbarrier shows (sm_90 and up): the issuing threads need not wait, and the consumers wait as for TMA loads.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

// Arrives at `barrier` when all cp.asyncs that this thread has issued so far have landed, perhaps long after this returns. It is one of the
// arrivals that the barrier was initialised with (the .noinc form). It shows those copies and nothing else that this thread did; they are
// plain stores, so whoever waits and then reads them asynchronously (WGMMA) calls fence_async_proxy in between.
CUTLASS_FA_DEVICE void cp_async_mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

}  // namespace cutlass_fa
