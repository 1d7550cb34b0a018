// SPDX-License-Identifier: BSD-3-Clause
// Host twin of ldmatrix.cuh.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void load_matrix_x4(uint32_t (&words)[4], void const* row, CUTLASS_FA_SITE) {
  executor::load_matrix(words, 4, row, false, site);
}

CUTLASS_FA_DEVICE void load_matrix_x4(uint32_t (&words)[4], SharedPointer row, CUTLASS_FA_SITE) {
  executor::load_matrix(words, 4, row.address, false, site);
}

CUTLASS_FA_DEVICE void load_matrix_x2(uint32_t (&words)[2], void const* row, CUTLASS_FA_SITE) {
  executor::load_matrix(words, 2, row, false, site);
}

CUTLASS_FA_DEVICE void load_matrix_x4_transposed(uint32_t (&words)[4], void const* row, CUTLASS_FA_SITE) {
  executor::load_matrix(words, 4, row, true, site);
}

CUTLASS_FA_DEVICE void load_matrix_x4_transposed(uint32_t (&words)[4], SharedPointer row, CUTLASS_FA_SITE) {
  executor::load_matrix(words, 4, row.address, true, site);
}

CUTLASS_FA_DEVICE void load_matrix_x2_transposed(uint32_t (&words)[2], void const* row, CUTLASS_FA_SITE) {
  executor::load_matrix(words, 2, row, true, site);
}

}  // namespace cutlass_fa
