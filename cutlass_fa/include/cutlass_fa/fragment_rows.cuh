// SPDX-License-Identifier: BSD-3-Clause
// Rows of a warp's accumulator to global memory in the element type, 16 bytes a lane.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// acc[i][j]: the 16 x 8 block of rows 16 i and columns 8 j in the fragment order of mma.cuh; each number is multiplied by `scale`.
// destination: element (0, 0); rows, columns: how many of each exist there (columns a multiple of 8). The quad's lanes trade 8-column
// blocks, so that each writes 16 bytes of one row. All 32 lanes call it.
template <class Element, int kRowBlocks, int kColumnBlocks>
CUTLASS_FA_DEVICE void store_rows(float const (&acc)[kRowBlocks][kColumnBlocks][4], float scale, Element* destination, int64_t row_stride,
                                  int rows, int columns) {
  int const lane = static_cast<unsigned>(thread_index()) % kWarpSize;
  int const quad_lane = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const row = 16 * i + 8 * r + lane / 4;
#pragma unroll
      for (int group = 0; group < kColumnBlocks; group += 4) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int const block = group + j;
          word[j] = block < kColumnBlocks ? pack2<Element>(acc[i][block][2 * r] * scale, acc[i][block][2 * r + 1] * scale) : 0;
        }
        quad_transpose(word, quad_lane);
        int const column = 8 * (group + quad_lane);
        if (row < rows && column < min(columns, 8 * kColumnBlocks)) {
          *reinterpret_cast<uint4*>(destination + row * row_stride + column) = make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
    }
  }
}

}  // namespace cutlass_fa
