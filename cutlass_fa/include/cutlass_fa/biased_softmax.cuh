// SPDX-License-Identifier: BSD-3-Clause
// Online softmax of scores with a bias that is linear in the key, as ALiBi's is on either side of a query (rows are those of softmax.cuh).
//
// An exponent is score * scale_log2 + first[r] - origin[r] + slope * column: a term for the row and one for the column. The two rows of a
// thread have the same columns, so origins are chosen, where they can be, so that the rows' terms are equal. One multiply-add then makes a
// term for two scores, and the multiply-add that every score has takes it in place of its origin. Nothing but range asks more of an origin:
// a row whose scores lie far below its neighbour's has one of its own, and pays an addition for each score.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/softmax.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// The bias of a block, in exponents of 2.
struct LinearBias {
  float slope;  // from one column to the next; from a row to the next as much less
  float first;  // of this thread's first row at its first column
  bool turned;  // the slope is another than the block's before, and origins are to be looked for anew
};

// Before a tile's first block.
CUTLASS_FA_DEVICE LinearBias linear_bias(float slope) { return {slope, 0.0f, false}; }

// How much less the bias of a thread's second row is, eight below its first.
CUTLASS_FA_DEVICE float lag_of(LinearBias const& bias) { return 8.0f * bias.slope; }

// How far below the origin, in powers of 2, a row may lie that shares its neighbour's. bfloat16 has float's range; float16 loses the
// precision of probabilities below 2^-14.
template <class Element>
constexpr float kMaxDepth = is_same<Element, float16> ? 2.0f : 64.0f;

// p <- exp2(acc_s * scale_log2 + first + slope * column). sum: this thread's part of each row.
template <class Element, int kSize>
CUTLASS_FA_DEVICE void exponentiate(float const (&acc_s)[kSize], float first, float slope, float scale_log2, uint32_t (&p)[kSize / 2],
                                    float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize / 4; ++j) {
    float const low_term = first + slope * static_cast<float>(8 * j), high_term = first + slope * static_cast<float>(8 * j + 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float const low = exp2_approx(acc_s[4 * j + 2 * r] * scale_log2 + low_term);
      float const high = exp2_approx(acc_s[4 * j + 2 * r + 1] * scale_log2 + high_term);
      sum[r] += low;
      sum[r] += high;
      p[2 * j + r] = pack2<Element>(low, high);
    }
  }
}

// The term of both rows: the first's, or the second's where only that has had a key.
CUTLASS_FA_DEVICE float term_of(SoftmaxRows const& rows, LinearBias const& bias) {
  float const origin = rows.origin[0] > negative_infinity() ? rows.origin[0] : rows.origin[1] + lag_of(bias);
  return bias.first - (origin > negative_infinity() ? origin : 0.0f);
}

// The rows' largest exponents in the block, before their origins; -inf where a row sees no key. They are looked for from the term that the
// rows have, so that the compiler does not take the search, which is rare, for something to do once for every block.
template <int kSize>
CUTLASS_FA_DEVICE void find_largest(float const (&acc_s)[kSize], SoftmaxRows const& rows, LinearBias const& bias, float scale_log2,
                                    float (&largest)[2]) {
  float const term = term_of(rows, bias);
  largest[0] = largest[1] = negative_infinity();
#pragma unroll
  for (int j = 0; j < kSize / 4; ++j) {
    float const low_term = term + bias.slope * static_cast<float>(8 * j), high_term = term + bias.slope * static_cast<float>(8 * j + 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = fmaxf(largest[r], acc_s[4 * j + 2 * r] * scale_log2 + low_term);
      largest[r] = fmaxf(largest[r], acc_s[4 * j + 2 * r + 1] * scale_log2 + high_term);
    }
  }
  largest[0] = quad_max(largest[0] + (bias.first - term));
  largest[1] = quad_max(largest[1] + (bias.first - term - lag_of(bias)));
}

// Origins <- the largest exponents so far, or what gives both rows one term where neither then lies deep. Sums follow; `rescale` <- what the
// output must be multiplied by. A row that has had no key keeps -inf and shares nothing, so that its first key is looked at.
template <class Element, int kSize>
CUTLASS_FA_DEVICE void move_origins(float const (&acc_s)[kSize], LinearBias const& bias, SoftmaxRows& rows, float (&rescale)[2], float scale_log2) {
  float largest[2], origin[2], level[2];  // level: what the row's keys so far amount to, at least
  find_largest(acc_s, rows, bias, scale_log2, largest);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    origin[r] = fmaxf(rows.origin[r], largest[r]);
    level[r] = fmaxf(largest[r], rows.origin[r] + log2_approx(quad_sum(rows.sum[r])));
  }
  float const lag = lag_of(bias);
  float const top = fmaxf(origin[0], origin[1] + lag);
  bool const near = fminf(level[0], level[1] + lag) > top - kMaxDepth<Element>;
  if (near) {
    origin[0] = top;
    origin[1] = top - lag;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rescale[r] = exp2_approx(rows.origin[r] - (origin[r] == negative_infinity() ? 0.0f : origin[r]));  // -inf - -inf would be NaN
    rows.origin[r] = origin[r];
    rows.sum[r] *= rescale[r];
  }
}

// Whether some thread of the warp needs different terms for its rows, or has a row that has had no key yet.
CUTLASS_FA_DEVICE bool have_two_terms(SoftmaxRows const& rows, LinearBias const& bias) {
  return warp_any(!(rows.origin[0] > negative_infinity() && rows.origin[1] == rows.origin[0] - lag_of(bias)));
}

// What the second row's scores need, in exponents, to take the first row's term. A row that has had no key takes any.
CUTLASS_FA_DEVICE float second_row_shift(SoftmaxRows const& rows, LinearBias const& bias) {
  bool const sees = fminf(rows.origin[0], rows.origin[1]) > negative_infinity();
  return sees ? rows.origin[0] - rows.origin[1] - lag_of(bias) : 0.0f;
}

template <int kSize>
CUTLASS_FA_DEVICE void shift_second_row(float (&acc_s)[kSize], float shift, float scale_log2) {
  float const shift_of_score = shift * reciprocal_approx(scale_log2);
#pragma unroll
  for (int j = 0; j < kSize / 4; ++j) {
    acc_s[4 * j + 2] += shift_of_score;
    acc_s[4 * j + 3] += shift_of_score;
  }
}

// Origins are moved where they must be, and scores shifted where the rows' terms still differ. Returns the term of both rows. shift: what the
// second row's scores have got before, in exponents.
template <class Element, int kSize>
CUTLASS_FA_DEVICE float settle_terms(float (&acc_s)[kSize], SoftmaxRows& rows, LinearBias const& bias, float (&rescale)[2], float scale_log2,
                                     bool& moves, float& shift) {
  moves |= warp_any(fminf(rows.origin[0], rows.origin[1]) == negative_infinity());
  if (moves) {
    shift_second_row(acc_s, -shift, scale_log2);
    move_origins<Element>(acc_s, bias, rows, rescale, scale_log2);
  }
  if (have_two_terms(rows, bias)) {
    shift = second_row_shift(rows, bias);
    shift_second_row(acc_s, shift, scale_log2);
  }
  return term_of(rows, bias);
}

// softmax.cuh's, with a bias. acc_s: masked scores are -inf; what it holds afterwards is of no use.
template <class Element, int kSize>
CUTLASS_FA_DEVICE bool online_softmax(float (&acc_s)[kSize], SoftmaxRows& rows, LinearBias const& bias, uint32_t (&p)[kSize / 2],
                                      float (&rescale)[2], float scale_log2, bool first = false) {
  float sum[2], shift = 0.0f;
  bool moves = first | bias.turned, failed;
#pragma unroll 1
  do {  // a loop rather than two branches, so that the exponentials are in the code once
    float term = bias.first - rows.origin[0];
    if (moves || have_two_terms(rows, bias)) { term = settle_terms<Element>(acc_s, rows, bias, rescale, scale_log2, moves, shift); }
    exponentiate<Element>(acc_s, term, bias.slope, scale_log2, p, sum);
    failed = !moves && warp_any(!(sum[0] <= kMaxBlockSum && sum[1] <= kMaxBlockSum));  // so written, NaN fails
    moves |= failed;
  } while (failed);
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return moves;
}

}  // namespace cutlass_fa
