// SPDX-License-Identifier: BSD-3-Clause
// One row of an accumulator whose columns stand in column_order (layouts.py): of every 16 a thread has four neighbours.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// out_row[column] <- acc * scale for the columns before `columns`, a multiple of 8; 0 where the row is not used. acc: from this thread's
// first number of the row on; the row's numbers are 8 g, 8 g + 4, 8 g + 1 and 8 g + 5: columns 16 g + 4 q and the next three, q the
// thread's place in the quad. All lanes of the warp call it.
template <class Out, int kColumns>
CUTLASS_FA_DEVICE void store_ordered_row(Out* out_row, int columns, float const* acc, float scale, bool in_range, bool is_used) {
  int const quad_lane = thread_index() % 4;
  if constexpr (is_same<Out, float>) {
#pragma unroll
    for (int group = 0; group < kColumns / 16; ++group) {
      float const* const x = acc + 8 * group;
      int const column = 16 * group + 4 * quad_lane;
      if (in_range && column < columns) {
        *reinterpret_cast<float4*>(out_row + column) =
            is_used ? make_float4(x[0] * scale, x[4] * scale, x[1] * scale, x[5] * scale) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  } else {
    bool const odd = quad_lane % 2;
#pragma unroll
    for (int group = 0; group < kColumns / 16; group += 2) {  // two neighbouring lanes trade: the even one gets this group, the odd the next
      uint32_t word[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const* const x = acc + 8 * (group + i);
        word[i][0] = is_used ? pack2<Out>(x[0] * scale, x[4] * scale) : 0;
        word[i][1] = is_used ? pack2<Out>(x[1] * scale, x[5] * scale) : 0;
      }
      uint32_t const other0 = shuffle_xor(odd ? word[0][0] : word[1][0], 1), other1 = shuffle_xor(odd ? word[0][1] : word[1][1], 1);
      int const column = 16 * (group + odd) + quad_lane / 2 * 8;
      if (in_range && column < columns) {
        *reinterpret_cast<uint4*>(out_row + column) =
            odd ? make_uint4(other0, other1, word[1][0], word[1][1]) : make_uint4(word[0][0], word[0][1], other0, other1);
      }
    }
  }
}

}  // namespace cutlass_fa
