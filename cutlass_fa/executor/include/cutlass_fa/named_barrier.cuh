// SPDX-License-Identifier: BSD-3-Clause
// Host twin of named_barrier.cuh.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void named_barrier_sync(int id, int threads, CUTLASS_FA_SITE) { executor::named_barrier_sync(id, threads, site); }

CUTLASS_FA_DEVICE void named_barrier_arrive(int id, int threads, CUTLASS_FA_SITE) { executor::named_barrier_arrive(id, threads, site); }

}  // namespace cutlass_fa
