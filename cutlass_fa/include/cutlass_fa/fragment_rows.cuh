// SPDX-License-Identifier: BSD-3-Clause
// A warp's accumulator to global memory: rows in the element type or in float, or its 16 x 8 blocks as they lie in registers.
#pragma once

#include <cutlass_fa/atomic.cuh>
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

// The same rows in float, unscaled, every column. destination: element (0, 0).
template <int kRowBlocks, int kColumnBlocks>
CUTLASS_FA_DEVICE void store_float_rows(float const (&acc)[kRowBlocks][kColumnBlocks][4], float* destination, int row_stride, int rows) {
  int const lane = static_cast<unsigned>(thread_index()) % kWarpSize;
  destination += lane / 4 * row_stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const row = 16 * i + 8 * r;
      if (row + lane / 4 >= rows) { continue; }
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        *reinterpret_cast<float2*>(destination + row * row_stride + 8 * j) = make_float2(acc[i][j][2 * r], acc[i][j][2 * r + 1]);
      }
    }
  }
}

// One 16 x 8 block among 128 floats, each request of the warp contiguous: a lane's four numbers together (kTogether, for GPUs that add
// four at once), or the first of all lanes, then the second, and so on.
template <bool kTogether>
CUTLASS_FA_DEVICE void add_fragment(float* fragment, int lane, float const (&acc)[4]) {
  if constexpr (kTogether) {
    atomic_add(fragment + 4 * lane, make_float4(acc[0], acc[1], acc[2], acc[3]));
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) { atomic_add(fragment + 32 * e + lane, acc[e]); }
  }
}

template <bool kTogether>
CUTLASS_FA_DEVICE float4 load_fragment(float const* fragment, int lane) {
  if constexpr (kTogether) { return *reinterpret_cast<float4 const*>(fragment + 4 * lane); }
  return make_float4(fragment[lane], fragment[32 + lane], fragment[64 + lane], fragment[96 + lane]);
}

}  // namespace cutlass_fa
