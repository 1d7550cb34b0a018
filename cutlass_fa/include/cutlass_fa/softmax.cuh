// SPDX-License-Identifier: BSD-3-Clause
// Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) on a tensor-core accumulator.
//
// A thread holds two rows of the accumulator, interleaved in pairs of columns: element 4 j + 2 r + c is row r, column pair j, column c.
// A row is spread over the four lanes of a quad. Maxima are kept equal in the quad; sums stay partial until `finalize`.
// The maximum follows lazily: a row keeps the one it has until a score exceeds it by kMaxLag, in powers of two. Probabilities then reach
// 2^kMaxLag instead of 1, which costs no precision in a floating-point format and none in the result, because the sum has the same factor;
// and in nearly every block no row moves, so that the output need not be rescaled (the idea is FlashAttention-4's).
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

constexpr float kMaxLag = 8.0f;  // 2^8 times the sum of a long row is far below float16's and float's largest numbers

struct SoftmaxRows {
  float max[2];  // the scores' origin: at most kMaxLag / scale_log2 below the largest score so far; equal in the quad
  float sum[2];  // sum of exp2((score - max) * scale_log2) over this thread's columns
};

// acc_s <- exp2((acc_s - row max) * scale_log2), rows updated, `rescale` <- what everything summed so far must be multiplied by.
// kFirst: no block came before. kMayBeEmpty: a row may have only -inf so far (masked blocks); its exponentials are then 0.
template <bool kFirst, bool kMayBeEmpty, int kSize>
CUTLASS_FA_DEVICE void online_softmax(float (&acc_s)[kSize], SoftmaxRows& rows, float (&rescale)[2], float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float row_max = kFirst ? acc_s[2 * r] : rows.max[r];
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j) {
      row_max = fmaxf(row_max, acc_s[4 * j + 2 * r]);
      row_max = fmaxf(row_max, acc_s[4 * j + 2 * r + 1]);
    }
    row_max = quad_max(row_max);
    // -inf - -inf would be NaN: a row without any key yet is measured from 0
    float base = kMayBeEmpty && row_max == negative_infinity() ? 0.0f : row_max;
    rescale[r] = 1.0f;
    if constexpr (!kFirst) {
      float const lag = (base - rows.max[r]) * scale_log2;
      if (lag <= kMaxLag) {
        base = row_max = rows.max[r];
      } else {
        rescale[r] = exp2_approx(-lag);
      }
    }
    rows.max[r] = row_max;

    float const base_scaled = base * scale_log2;
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j) {
      acc_s[4 * j + 2 * r] = exp2_approx(acc_s[4 * j + 2 * r] * scale_log2 - base_scaled);
      acc_s[4 * j + 2 * r + 1] = exp2_approx(acc_s[4 * j + 2 * r + 1] * scale_log2 - base_scaled);
    }
    float sum = kFirst ? 0.0f : rows.sum[r] * rescale[r];
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j) {
      sum += acc_s[4 * j + 2 * r];
      sum += acc_s[4 * j + 2 * r + 1];
    }
    rows.sum[r] = sum;
  }
}

// Output rows follow their scores where some row of the warp has moved.
template <int kSize>
CUTLASS_FA_DEVICE void rescale_rows(float (&acc_o)[kSize], float const (&rescale)[2]) {
  if (warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      acc_o[i] *= rescale[(i >> 1) & 1];
    }
  }
}

// The probabilities of a block as the A operand of the next product. The accumulator's register order is the operand's order.
template <class Element, int kSize>
CUTLASS_FA_DEVICE void convert_to_operand(float const (&acc_s)[kSize], uint32_t (&p)[kSize / 2]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    p[i] = pack2<Element>(acc_s[2 * i], acc_s[2 * i + 1]);
  }
}

// What a row's output must be multiplied by, and its log-sum-exp (natural logarithm). A row without keys: 0 and -inf.
struct RowResult {
  float normalizer;
  float lse;
};

CUTLASS_FA_DEVICE RowResult finalize(SoftmaxRows const& rows, int r, float scale_log2) {
  float const sum = quad_sum(rows.sum[r]);
  bool const empty = sum == 0.0f;
  return {empty ? 0.0f : 1.0f / sum, empty ? negative_infinity() : (rows.max[r] * scale_log2 + log2_approx(sum)) * kLn2};
}

}  // namespace cutlass_fa
