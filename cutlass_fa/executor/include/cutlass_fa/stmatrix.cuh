// SPDX-License-Identifier: BSD-3-Clause
// Host twin of stmatrix.cuh.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void store_matrix_x4(void* row, uint32_t const (&words)[4], CUTLASS_FA_SITE) {
  executor::store_matrix(row, words, 4, false, site);
}

CUTLASS_FA_DEVICE void store_matrix_x2(void* row, uint32_t const (&words)[2], CUTLASS_FA_SITE) {
  executor::store_matrix(row, words, 2, false, site);
}

CUTLASS_FA_DEVICE void store_matrix_x4_transposed(void* row, uint32_t const (&words)[4], CUTLASS_FA_SITE) {
  executor::store_matrix(row, words, 4, true, site);
}

CUTLASS_FA_DEVICE void store_matrix_x2_transposed(void* row, uint32_t const (&words)[2], CUTLASS_FA_SITE) {
  executor::store_matrix(row, words, 2, true, site);
}

}  // namespace cutlass_fa
