// SPDX-License-Identifier: BSD-3-Clause
// Online softmax whose probabilities are E4M3, the A operand of a product of 8-bit numbers. Rows are those of softmax.cuh.
//
// Sixteen bits leave a row's origin alone until a probability nears the end of their range. Eight do not allow that: a row that one key
// dominates is as exact as that key's probability, which three bits of mantissa round by up to 6%, unless it is a power of 2. So a row is
// always measured from its largest score so far, less kPeakLog2: its largest probability is 2^8, and E4M3 reaches from there (its largest
// number is 448) down to 2^-9, 17 powers of 2 (FlashAttention-3 has the same peak). The sum is that of numbers before they are rounded.
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

namespace cutlass_fa {

constexpr float kPeakLog2 = 8.0f;

// p <- exp2(acc_s * scale_log2 - origin) as the A operand of the next product, four registers for each 32 columns.
// sum: to which this thread's part of each row is added.
template <int kSize>
CUTLASS_FA_DEVICE void exponentiate_fp8(float const (&acc_s)[kSize], float const (&origin)[2], float scale_log2, uint32_t (&p)[kSize / 4],
                                        float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    int const r = i % 2;
    float const* const scores = acc_s + i / 2 * 8 + 2 * r;  // of two blocks of 8 columns
    float const x0 = exp2_approx(scores[0] * scale_log2 - origin[r]), x1 = exp2_approx(scores[1] * scale_log2 - origin[r]);
    float const x2 = exp2_approx(scores[4] * scale_log2 - origin[r]), x3 = exp2_approx(scores[5] * scale_log2 - origin[r]);
    sum[r] += x0;
    sum[r] += x1;
    sum[r] += x2;
    sum[r] += x3;
    p[i] = pack4_e4m3(x0, x1, x2, x3);
  }
}

// p <- the block's probabilities, rows updated. acc_s: masked scores are -inf. False for the whole warp where no row has a new largest
// score; else `rescale` is what the output must be multiplied by. first: no block came before, and there is no output yet.
template <int kSize>
CUTLASS_FA_DEVICE bool online_softmax_fp8(float const (&acc_s)[kSize], SoftmaxRows& rows, uint32_t (&p)[kSize / 4], float (&rescale)[2],
                                          float scale_log2, bool first = false) {
  float base[2];
  move_origins(acc_s, {true, true}, rows, base, rescale, scale_log2, kPeakLog2);
  exponentiate_fp8(acc_s, base, scale_log2, p, rows.sum);
  return first || warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f);
}

}  // namespace cutlass_fa
