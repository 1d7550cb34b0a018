// SPDX-License-Identifier: BSD-3-Clause
// Host twin of tma.cuh. A tensor map's 128 bytes hold executor::TensorMapFields.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(executor::TensorMapFields) <= sizeof(TensorMap), "the fields do not fit the driver's type");

enum class CacheHint : uint64_t {
  kEvictFirst = 0x12F0000000000000ull,
  kEvictLast = 0x14F0000000000000ull,
};

CUTLASS_FA_DEVICE void prefetch_tensor_map(TensorMap const& map, CUTLASS_FA_SITE) { executor::prefetch_tensor_map(&map, site); }

CUTLASS_FA_DEVICE void tma_load(TensorMap const& map, Mbarrier& barrier, CacheHint, void* destination, int column, int row, int head,
                                int batch, CUTLASS_FA_SITE) {
  int const coordinates[4] = {column, row, head, batch};
  executor::tma_load(&map, &barrier.state, destination, coordinates, 4, site);
}

CUTLASS_FA_DEVICE void tma_load(TensorMap const& map, Mbarrier& barrier, CacheHint, void* destination, int column, int head, int row,
                                int group, int batch, CUTLASS_FA_SITE) {
  int const coordinates[5] = {column, head, row, group, batch};
  executor::tma_load(&map, &barrier.state, destination, coordinates, 5, site);
}

}  // namespace cutlass_fa
