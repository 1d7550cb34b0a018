// SPDX-License-Identifier: BSD-3-Clause
// stmatrix (sm_90 and up): the reverse of ldmatrix.cuh, with the same rows, lanes and words: 8 x 8 matrices of 16-bit elements from the
// fragments of a tensor-core accumulator, packed to pairs, to 16-byte rows of shared memory.
// All 32 lanes call these; they order no memory, and asynchronous readers need fence_async_proxy as after any plain store.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void store_matrix_x4(void* row, uint32_t const (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

CUTLASS_FA_DEVICE void store_matrix_x2(void* row, uint32_t const (&words)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(words[0]), "r"(words[1])
               : "memory");
}

CUTLASS_FA_DEVICE void store_matrix_x4_transposed(void* row, uint32_t const (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

CUTLASS_FA_DEVICE void store_matrix_x2_transposed(void* row, uint32_t const (&words)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(words[0]), "r"(words[1])
               : "memory");
}

}  // namespace cutlass_fa
