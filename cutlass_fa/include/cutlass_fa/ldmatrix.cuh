// SPDX-License-Identifier: BSD-3-Clause
// ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory into the fragments of mma.sync.
//
// Each row is 16 contiguous bytes, aligned to 16, at an address of its own: lane l names row l % 8 of matrix l / 8 (the two-matrix form
// reads the addresses of lanes 0 to 15 only). words[j] is matrix j's part for this lane:
// row l / 4, columns 2 (l % 4) and the next; of the transposed form, column l / 4, rows 2 (l % 4) and the next (PTX ISA, "ldmatrix").
// All 32 lanes call these; they order no memory: a barrier stands between them and whoever wrote.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void load_matrix_x4(uint32_t (&words)[4], SharedPointer row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row.address)
               : "memory");
}

CUTLASS_FA_DEVICE void load_matrix_x4(uint32_t (&words)[4], void const* row) { load_matrix_x4(words, SharedPointer{shared_address(row)}); }

CUTLASS_FA_DEVICE void load_matrix_x2(uint32_t (&words)[2], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_address(row))
               : "memory");
}

CUTLASS_FA_DEVICE void load_matrix_x4_transposed(uint32_t (&words)[4], SharedPointer row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row.address)
               : "memory");
}

CUTLASS_FA_DEVICE void load_matrix_x4_transposed(uint32_t (&words)[4], void const* row) {
  load_matrix_x4_transposed(words, SharedPointer{shared_address(row)});
}

CUTLASS_FA_DEVICE void load_matrix_x2_transposed(uint32_t (&words)[2], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace cutlass_fa
