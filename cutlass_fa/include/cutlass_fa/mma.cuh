// SPDX-License-Identifier: BSD-3-Clause
// mma.sync: D[16, 8] += A[16, 16] B[16, 8] by one warp, on 16-bit inputs with float accumulators; complete when it returns.
//
// Fragments of lane l, with g = l / 4 and t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; layouts.py's
// mma_*_coordinates):
//   d[0], d[1]: row g, columns 2t, 2t + 1; d[2], d[3]: row g + 8, the same columns.
//   a[i]: row g + 8 (i % 2), k = 8 (i / 2) + 2t in the low half and the next k in the high one.
//   b0, b1: column g, k = 2t and 2t + 1 (b0), 2t + 8 and 2t + 9 (b1).
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// All 32 lanes call it. Two D of neighbouring columns, packed to 16-bit pairs, are the A of 16 k of a next product: the P of P V needs no
// shuffle.
template <class Element>
CUTLASS_FA_DEVICE void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "mma multiplies bf16 or f16");
  if constexpr (is_same<Element, bfloat16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace cutlass_fa
