// SPDX-License-Identifier: BSD-3-Clause
// Online softmax in pieces, for kernels whose warps multiply with mma.sync: the exponentials of some keys can then be computed while the
// products of other keys run. Rows and sums are distributed as in softmax.cuh, and origins follow as lazily.
//
// In nearly every block no row's origin has to move, and to know that takes no exchange between lanes: each looks at its own columns, and
// the warp votes.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/softmax.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

struct LazyRows {
  float origin[2];  // what is subtracted from the scaled scores; equal in the quad
  float sum[2];     // sum of exp2(score * scale_log2 - origin) over this thread's columns
};

constexpr float kMaxLag = 8.0f;  // 2^8 times the sum of a long row is far below float16's and float's largest numbers

// Below every score and yet finite: a row that has seen only -inf gets exp2(-inf) = 0 from it, where -inf - -inf would be NaN.
constexpr float kLowestOrigin = -3.402823466e38f;

CUTLASS_FA_DEVICE LazyRows no_keys_yet() { return {{kLowestOrigin, kLowestOrigin}, {0.0f, 0.0f}}; }

// The largest score of row r among this thread's columns.
template <int kSize>
CUTLASS_FA_DEVICE float largest_score(float const (&acc_s)[kSize], int r) {
  float largest = fmaxf(acc_s[2 * r], acc_s[2 * r + 1]);
#pragma unroll
  for (int j = 1; j < kSize / 4; ++j) {
    largest = fmaxf(largest, acc_s[4 * j + 2 * r]);
    largest = fmaxf(largest, acc_s[4 * j + 2 * r + 1]);
  }
  return largest;
}

// Whether a score of this thread's two rows exceeds its row's origin by more than kMaxLag.
template <int kSize>
CUTLASS_FA_DEVICE bool outgrows(float const (&acc_s)[kSize], LazyRows const& rows, float scale_log2) {
  bool const first = largest_score(acc_s, 0) * scale_log2 - rows.origin[0] > kMaxLag;
  bool const second = largest_score(acc_s, 1) * scale_log2 - rows.origin[1] > kMaxLag;
  return first | second;  // no branch between the two
}

// Moves the origins of rows that have outgrown theirs to the largest score that the quad sees; sums and output follow. All lanes of the warp
// call it.
template <int kSize, int kColumns>
CUTLASS_FA_DEVICE void move_origins(float const (&acc_s)[kSize], LazyRows& rows, float (&acc_o)[kColumns], float scale_log2) {
  float rescale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float const largest = quad_max(largest_score(acc_s, r)) * scale_log2;
    bool const moves = largest - rows.origin[r] > kMaxLag;
    rescale[r] = moves ? exp2_approx(rows.origin[r] - largest) : 1.0f;  // 0 where the row had no key
    rows.origin[r] = moves ? largest : rows.origin[r];
    rows.sum[r] *= rescale[r];
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) { acc_o[i] *= rescale[(i >> 1) & 1]; }
}

// Eight scores of a thread (two rows, 16 keys) become probabilities, not normalised, and are added to the sums.
CUTLASS_FA_DEVICE void exponentiate(float (&scores)[8], LazyRows& rows, float scale_log2) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int const r = i / 2 % 2;
    scores[i] = exp2_approx(scores[i] * scale_log2 - rows.origin[r]);
    rows.sum[r] += scores[i];
  }
}

// Probabilities as the A operand of the next product. The accumulator's register order is the operand's order.
template <class Element, int kSize>
CUTLASS_FA_DEVICE void convert_to_operand(float const (&acc_s)[kSize], uint32_t (&p)[kSize / 2]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    p[i] = pack2<Element>(acc_s[2 * i], acc_s[2 * i + 1]);
  }
}

// The same rows in softmax.cuh's terms.
CUTLASS_FA_DEVICE SoftmaxRows softmax_rows(LazyRows const& rows) { return {{rows.origin[0], rows.origin[1]}, {rows.sum[0], rows.sum[1]}}; }

}  // namespace cutlass_fa
