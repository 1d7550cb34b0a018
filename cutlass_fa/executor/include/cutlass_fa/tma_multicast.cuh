// SPDX-License-Identifier: BSD-3-Clause
// Host twin of tma_multicast.cuh. The box lands in each CTA at a time of its own.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cluster.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void tma_load_multicast(TensorMap const& map, Mbarrier& barrier, uint16_t cta_mask, CacheHint, void* destination,
                                          int column, int row, int head, int batch, CUTLASS_FA_SITE) {
  int const coordinates[4] = {column, row, head, batch};
  executor::tma_load_multicast(&map, &barrier.state, cta_mask, destination, coordinates, 4, site);
}

CUTLASS_FA_DEVICE void tma_load_multicast(TensorMap const& map, Mbarrier& barrier, uint16_t cta_mask, CacheHint, void* destination,
                                          int column, int head, int row, int group, int batch, CUTLASS_FA_SITE) {
  int const coordinates[5] = {column, head, row, group, batch};
  executor::tma_load_multicast(&map, &barrier.state, cta_mask, destination, coordinates, 5, site);
}

}  // namespace cutlass_fa
