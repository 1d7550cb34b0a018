// SPDX-License-Identifier: BSD-3-Clause
// Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) on a tensor-core accumulator.
//
// A thread holds two rows of the accumulator, interleaved in pairs of columns: element 4 j + 2 r + c is row r, column pair j, column c.
// A row is spread over the four lanes of a quad. Origins are kept equal in the quad; sums stay partial until `finalize`.
//
// A row's scores are measured from an origin, its largest score when that was last looked for. Nothing but range asks for the largest: the
// sum has the same factor as the output, and probabilities above 1 cost a floating-point format no precision. So every block is tried with
// the origins that its rows have, and only where a sum says that a probability may have passed 2^8 does the warp look for the maxima, move
// the origins of those rows and have the output rescaled. After a row's first block that is rare, and without it a score costs a
// multiply-add, an exponential, an addition and half a conversion, none of which waits for a maximum. (FlashAttention-4 has a threshold on
// the maximum.) Nothing that a row becomes depends on the rows beside it, so that a prompt gives the same bits however it is cut into tiles.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

constexpr float kMaxBlockSum = 256.0f;  // of a thread's part of a row in one block; far below float16's largest number

struct SoftmaxRows {
  float origin[2];  // score * scale_log2 that probabilities are measured from; -inf before the first key; equal in the quad
  float sum[2];     // sum of exp2(score * scale_log2 - origin) over this thread's columns
};

CUTLASS_FA_DEVICE SoftmaxRows empty_rows() { return {{negative_infinity(), negative_infinity()}, {0.0f, 0.0f}}; }

// p <- exp2(acc_s * scale_log2 - origin) as the A operand of the next product, whose register order is the accumulator's.
// sum: this thread's part of each row.
template <class Element, int kSize>
CUTLASS_FA_DEVICE void exponentiate(float const (&acc_s)[kSize], float const (&origin)[2], float scale_log2, uint32_t (&p)[kSize / 2],
                                    float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    int const r = i % 2;
    float const low = exp2_approx(acc_s[2 * i] * scale_log2 - origin[r]);
    float const high = exp2_approx(acc_s[2 * i + 1] * scale_log2 - origin[r]);
    sum[r] += low;
    sum[r] += high;
    p[i] = pack2<Element>(low, high);
  }
}

// Origins of rows that move <- the largest scores so far. base: the same, but 0 for a row that has only -inf (-inf - -inf would be NaN),
// whose probabilities are then 0. Sums follow; `rescale` <- what the output must be multiplied by: 1 where a row stays. peak_log2: how far
// below the largest score.
template <int kSize>
CUTLASS_FA_DEVICE void move_origins(float const (&acc_s)[kSize], bool const (&moves)[2], SoftmaxRows& rows, float (&base)[2],
                                    float (&rescale)[2], float scale_log2, float peak_log2 = 0.0f) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float row_max = acc_s[2 * r];
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j) {
      row_max = fmaxf(row_max, acc_s[4 * j + 2 * r]);
      row_max = fmaxf(row_max, acc_s[4 * j + 2 * r + 1]);
    }
    float const largest = fmaxf(rows.origin[r], quad_max(row_max) * scale_log2 - peak_log2);
    float const origin = moves[r] ? largest : rows.origin[r];
    base[r] = origin == negative_infinity() ? 0.0f : origin;
    rescale[r] = exp2_approx(rows.origin[r] - base[r]);
    rows.origin[r] = origin;
    rows.sum[r] *= rescale[r];
  }
}

// Whether a row's part says that its origin must move. So written, NaN does.
CUTLASS_FA_DEVICE bool fails(float sum) { return !(sum <= kMaxBlockSum); }

// p <- the block's probabilities, rows updated. acc_s: masked scores are -inf. False for the whole warp where no row's origin moved; else
// `rescale` is what the output must be multiplied by. Origins move first where `first` (no block came before), and those of rows whose try
// without has failed. A row that has had no key yet makes infinity or NaN of its old origin: its try fails.
template <class Element, int kSize>
CUTLASS_FA_DEVICE bool online_softmax(float const (&acc_s)[kSize], SoftmaxRows& rows, uint32_t (&p)[kSize / 2], float (&rescale)[2],
                                      float scale_log2, bool first = false) {
  float base[2] = {rows.origin[0], rows.origin[1]}, sum[2];
  bool moves = first, failed;
#pragma unroll 1
  do {  // a loop rather than two branches, so that the exponentials are in the code once
    if (moves) {
      bool const row_moves[2] = {first || quad_any(fails(sum[0])), first || quad_any(fails(sum[1]))};
      move_origins(acc_s, row_moves, rows, base, rescale, scale_log2);
    }
    exponentiate<Element>(acc_s, base, scale_log2, p, sum);
    failed = !moves && warp_any(fails(sum[0]) || fails(sum[1]));
    moves |= failed;
  } while (failed);
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return moves;
}

// Output rows follow their scores.
template <int kSize>
CUTLASS_FA_DEVICE void rescale_rows(float (&acc_o)[kSize], float const (&rescale)[2]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    acc_o[i] *= rescale[(i >> 1) & 1];
  }
}

// What a row's output must be multiplied by, and its log-sum-exp (natural logarithm). A row without keys: 0 and -inf.
struct RowResult {
  float normalizer;
  float lse;
};

// origin, sum: of the whole row.
CUTLASS_FA_DEVICE RowResult result_of(float origin, float sum) {
  bool const empty = sum == 0.0f;
  return {empty ? 0.0f : 1.0f / sum, empty ? negative_infinity() : (origin + log2_approx(sum)) * kLn2};
}

CUTLASS_FA_DEVICE RowResult finalize(SoftmaxRows const& rows, int r) { return result_of(rows.origin[r], quad_sum(rows.sum[r])); }

// The same with a logit that has no key and no value and only joins the row's sum (natural logarithm, not scaled; -inf: none). The sum is
// measured from the larger of the two, so that neither overflows. A row without keys: 0 and the logit.
CUTLASS_FA_DEVICE RowResult result_of(float origin, float sum, float logit) {
  float const logit_log2 = logit * kLog2E;
  float const larger = fmaxf(origin, logit_log2);
  float const rescale = exp2_approx(origin - larger);
  float const total = sum * rescale + exp2_approx(logit_log2 - larger);
  float const lse = (logit_log2 > origin ? logit : origin * kLn2) + log2_approx(total) * kLn2;
  bool const empty = sum == 0.0f;  // its origin may be -inf, and the numbers above NaN
  return {empty ? 0.0f : rescale / total, empty ? logit : lse};
}

CUTLASS_FA_DEVICE RowResult finalize(SoftmaxRows const& rows, int r, float logit) { return result_of(rows.origin[r], quad_sum(rows.sum[r]), logit); }

}  // namespace cutlass_fa
