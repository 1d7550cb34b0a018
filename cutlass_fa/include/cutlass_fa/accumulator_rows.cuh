// SPDX-License-Identifier: BSD-3-Clause
// A WGMMA accumulator's rows as 16-byte pieces: element 4 j + 2 r + c is row r, column 8 j + 2 (lane % 4) + c.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// Two neighbouring lanes trade pairs of columns of two blocks of 8, so that each has four columns of one row: the even lane of this block,
// the odd one of the next. All 32 lanes call it. block: even; the numbers are multiplied by `scale`.
template <int kSize>
CUTLASS_FA_DEVICE float4 traded_columns(float const (&acc)[kSize], int block, int r, float scale) {
  bool const odd = thread_index() % 2;
  float const* const pair = acc + 4 * block + 2 * r;
  float const x = (odd ? pair[4] : pair[0]) * scale, y = (odd ? pair[5] : pair[1]) * scale;
  float const other_x = shuffle_xor((odd ? pair[0] : pair[4]) * scale, 1);
  float const other_y = shuffle_xor((odd ? pair[1] : pair[5]) * scale, 1);
  return odd ? make_float4(other_x, other_y, x, y) : make_float4(x, y, other_x, other_y);
}

// The first of them.
CUTLASS_FA_DEVICE int traded_column(int block) { return 8 * (block + thread_index() % 2) + thread_index() % 4 / 2 * 4; }

}  // namespace cutlass_fa
