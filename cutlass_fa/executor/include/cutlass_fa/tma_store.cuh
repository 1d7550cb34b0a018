// SPDX-License-Identifier: BSD-3-Clause
// Host twin of tma_store.cuh.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void tma_store(TensorMap const& map, void const* source, int column, int row, int head, int batch, CUTLASS_FA_SITE) {
  int const coordinates[4] = {column, row, head, batch};
  executor::tma_store(&map, source, coordinates, 4, false, site);
}

CUTLASS_FA_DEVICE void tma_store(TensorMap const& map, void const* source, int column, int head, int row, int group, int batch,
                                 CUTLASS_FA_SITE) {
  int const coordinates[5] = {column, head, row, group, batch};
  executor::tma_store(&map, source, coordinates, 5, false, site);
}

CUTLASS_FA_DEVICE void tma_reduce_add(TensorMap const& map, void const* source, int column, int row, int head, int batch, CUTLASS_FA_SITE) {
  int const coordinates[4] = {column, row, head, batch};
  executor::tma_store(&map, source, coordinates, 4, true, site);
}

CUTLASS_FA_DEVICE void bulk_reduce_add(float* destination, void const* source, int bytes, CUTLASS_FA_SITE) {
  executor::bulk_reduce_add(destination, source, bytes, site);
}

CUTLASS_FA_DEVICE void tma_store_commit(CUTLASS_FA_SITE) { executor::tma_store_commit(site); }

template <int kPending>
CUTLASS_FA_DEVICE void tma_store_wait_read(CUTLASS_FA_SITE) {
  executor::tma_store_wait(kPending, true, site);
}

template <int kPending>
CUTLASS_FA_DEVICE void tma_store_wait(CUTLASS_FA_SITE) {
  executor::tma_store_wait(kPending, false, site);
}

}  // namespace cutlass_fa
