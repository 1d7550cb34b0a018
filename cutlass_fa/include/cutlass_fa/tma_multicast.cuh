// SPDX-License-Identifier: BSD-3-Clause
// TMA loads that land in several CTAs of a cluster (cluster.cuh): one read of global memory serves all of them.
//
// Of CTAs that need the same tile each loads a part for all. In every CTA of the mask (bit r: rank r) the box lands where `destination` lies
// in this one, and its bytes are reported to the mbarrier that lies there where `barrier` lies here: each CTA's own thread expects the
// bytes of all parts. The destination must be free in each of them (remote_arrive tells), and their mbarriers initialised (cluster_sync).
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cluster.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>

namespace cutlass_fa {

// The coordinates are tma_load's: (column, row, head, batch).
CUTLASS_FA_DEVICE void tma_load_multicast(TensorMap const& map, Mbarrier& barrier, uint16_t cta_mask, CacheHint hint, void* destination,
                                          int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(cta_mask),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// The same for a tensor of five dimensions: (column, head in group, row, group, batch).
CUTLASS_FA_DEVICE void tma_load_multicast(TensorMap const& map, Mbarrier& barrier, uint16_t cta_mask, CacheHint hint, void* destination,
                                          int column, int head, int row, int group, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(head), "r"(row), "r"(group), "r"(batch), "h"(cta_mask),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

}  // namespace cutlass_fa
