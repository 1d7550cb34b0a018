// SPDX-License-Identifier: BSD-3-Clause
// Online softmax whose probabilities are E4M3, the A operand of a product of 8-bit numbers. Rows are those of softmax.cuh.
//
// Sixteen bits have range to spare; eight do not: E4M3 ends at 448 = 2^8.8 and is coarse below 2^-6. So a row is measured from 2^kPeakLog2
// below its largest score when that was last looked for: its largest probability is then 2^kPeakLog2, and scores may grow by 2^2.7 more
// before one would pass 448. Where one does, it is a number that saturates, which the packed words show at a quarter of an instruction a
// score; only then does the warp look for maxima. (FlashAttention-3 looks for them in every block, and has its largest at 2^8.)
//
// The accumulator's fragments and the operand's differ: a thread has columns 8 j + 2 q and the next of every 8 (q: its place in the quad),
// and as operand four neighbours of every 16. Nothing is moved: the operand's columns are taken in another order, kv_order of layouts.py,
// in which V^T has its keys too.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/float8.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/softmax.cuh>
#include <cutlass_fa/warp.cuh>
#include <cutlass_fa/wgmma.cuh>

namespace cutlass_fa {

constexpr float kPeakLog2 = 6.0f;

// p <- exp2(acc_s * scale_log2 - origin) as the A operand of the next product, four registers for each 32 columns.
// sum: this thread's part of each row. True where a number saturates (or is NaN). fmaf and not a product and a difference: products, which
// no further try changes, would be computed before the tries and kept beside the scores.
template <int kSize>
CUTLASS_FA_DEVICE bool exponentiate_fp8(float const (&acc_s)[kSize], float const (&origin)[2], float scale_log2, uint32_t (&p)[kSize / 4],
                                        float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
  uint32_t large = 0;
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    int const r = i % 2;
    float const* const scores = acc_s + i / 2 * 8 + 2 * r;  // of two blocks of 8 columns
    float const x0 = exp2_approx(fmaf(scores[0], scale_log2, -origin[r])), x1 = exp2_approx(fmaf(scores[1], scale_log2, -origin[r]));
    float const x2 = exp2_approx(fmaf(scores[4], scale_log2, -origin[r])), x3 = exp2_approx(fmaf(scores[5], scale_log2, -origin[r]));
    sum[r] += x0;
    sum[r] += x1;
    sum[r] += x2;
    sum[r] += x3;
    p[i] = pack4_e4m3(x0, x1, x2, x3);
    large |= p[i] + 0x02020202u;  // 448 is 0x7e and NaN 0x7f: their bytes, and no others, get the highest bit
  }
  return (large & 0x80808080u) != 0;
}

// As online_softmax of softmax.cuh.
template <int kSize>
CUTLASS_FA_DEVICE bool online_softmax_fp8(float const (&acc_s)[kSize], SoftmaxRows& rows, uint32_t (&p)[kSize / 4], float (&rescale)[2],
                                          float scale_log2, bool first = false) {
  float base[2] = {rows.origin[0], rows.origin[1]}, sum[2];
  bool moves = first, failed;
#pragma unroll 1
  do {  // a loop rather than two branches, so that the exponentials are in the code once
    if (moves) { move_origins(acc_s, rows, base, rescale, scale_log2, kPeakLog2); }
    bool const saturates = exponentiate_fp8(acc_s, base, scale_log2, p, sum);
    pin_registers(sum);  // or they would be added up after the loop, to which every exponential would have to live
    failed = !moves && warp_any(saturates);
    moves |= failed;
  } while (failed);
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return moves;
}

}  // namespace cutlass_fa
