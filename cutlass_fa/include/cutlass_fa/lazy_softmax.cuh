// SPDX-License-Identifier: BSD-3-Clause
// Online softmax in pieces, for kernels whose warps multiply with mma.sync: the exponentials of some keys are computed while the products of
// other keys run. Rows are those of softmax.cuh.
//
// The products come before all of a block's sums are there, so that the sums cannot say whether a row's origin still serves: its largest
// score does. That takes no exchange between lanes: each looks at its own columns, and the warp votes; in nearly every block no row moves.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/softmax.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

constexpr float kMaxLag = 8.0f;  // probabilities reach 2^8 before a row's origin moves

// Below every score and yet finite: a row that has seen only -inf gets exp2(-inf) = 0 from it, where -inf - -inf would be NaN.
constexpr float kLowestOrigin = -3.402823466e38f;

CUTLASS_FA_DEVICE SoftmaxRows unseen_rows() { return {{kLowestOrigin, kLowestOrigin}, {0.0f, 0.0f}}; }

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
CUTLASS_FA_DEVICE bool outgrows(float const (&acc_s)[kSize], SoftmaxRows const& rows, float scale_log2) {
  bool const first = largest_score(acc_s, 0) * scale_log2 - rows.origin[0] > kMaxLag;
  bool const second = largest_score(acc_s, 1) * scale_log2 - rows.origin[1] > kMaxLag;
  return first | second;  // no branch between the two
}

// Moves the origins of rows that have been outgrown to the largest score that the quad sees; sums and output follow. All lanes of the warp
// call it.
template <int kSize, int kColumns>
CUTLASS_FA_DEVICE void move_origins(float const (&acc_s)[kSize], SoftmaxRows& rows, float (&acc_o)[kColumns], float scale_log2) {
  float rescale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float const largest = quad_max(largest_score(acc_s, r)) * scale_log2;
    bool const moves = largest - rows.origin[r] > kMaxLag;
    rescale[r] = moves ? exp2_approx(rows.origin[r] - largest) : 1.0f;  // 0 where the row had no key
    rows.origin[r] = moves ? largest : rows.origin[r];
    rows.sum[r] *= rescale[r];
  }
  rescale_rows(acc_o, rescale);
}

// Eight scores of a thread (two rows, 16 keys) become probabilities, not normalised, and are added to the sums.
CUTLASS_FA_DEVICE void exponentiate_keys(float (&scores)[8], SoftmaxRows& rows, float scale_log2) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int const r = i / 2 % 2;
    scores[i] = exp2_approx(scores[i] * scale_log2 - rows.origin[r]);
    rows.sum[r] += scores[i];
  }
}

// Probabilities as the A operand of the next product. The accumulator's register order is the operand's order.
template <class Element, int kSize>
CUTLASS_FA_DEVICE void convert_to_operand(float const (&acc_p)[kSize], uint32_t (&p)[kSize / 2]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) { p[i] = pack2<Element>(acc_p[2 * i], acc_p[2 * i + 1]); }
}

}  // namespace cutlass_fa
