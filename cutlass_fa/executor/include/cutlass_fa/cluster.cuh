// SPDX-License-Identifier: BSD-3-Clause
// Host twin of cluster.cuh. The CTAs of a cluster are fibers of one run, each with its own shared memory.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE int cluster_rank() { return executor::cluster_rank(); }

CUTLASS_FA_DEVICE int cluster_size() { return executor::cluster_size(); }

CUTLASS_FA_DEVICE void cluster_arrive(CUTLASS_FA_SITE) { executor::cluster_arrive(site); }

CUTLASS_FA_DEVICE void cluster_wait(CUTLASS_FA_SITE) { executor::cluster_wait(site); }

CUTLASS_FA_DEVICE void cluster_sync(CUTLASS_FA_SITE) {
  executor::cluster_arrive(site);
  executor::cluster_wait(site);
}

CUTLASS_FA_DEVICE void remote_arrive(Mbarrier& barrier, int rank, CUTLASS_FA_SITE) { executor::remote_arrive(&barrier.state, rank, site); }

CUTLASS_FA_DEVICE uint32_t remote_load(uint32_t const* pointer, int rank, CUTLASS_FA_SITE) {
  return executor::remote_load(pointer, rank, site);
}

}  // namespace cutlass_fa
