// SPDX-License-Identifier: BSD-3-Clause
// Host twin of cp_async_mbarrier.cuh. The arrival comes by itself, after the copies.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void cp_async_mbarrier_arrive(Mbarrier& barrier, CUTLASS_FA_SITE) {
  executor::cp_async_mbarrier_arrive(&barrier.state, site);
}

}  // namespace cutlass_fa
