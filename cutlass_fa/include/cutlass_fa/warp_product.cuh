// SPDX-License-Identifier: BSD-3-Clause
// Products of one warp on tiles in shared memory, by mma.sync and ldmatrix; 16-bit elements, float accumulators.
//
// A tile has rows at a pitch of an odd number of 16-byte units, so that the eight rows that one 8 x 8 matrix is read from lie in different
// banks (layouts.py, PaddedTile), and every address is a register plus a constant. acc[i][j] is the 16 x 8 block of rows 16 i and columns
// 8 j of the product, in the fragment order of mma.cuh. Pointers to tiles are each lane's own: the first element's address plus one of the
// two lane offsets below. All 32 lanes call these.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/mma.cuh>

namespace cutlass_fa {

// Where a lane's row of a 16 x 16 block starts, for operands whose matrices go down the rows first: A with k along the rows' elements
// (the columns), and, transposed on the way, B with k along the rows. layouts.py: ldmatrix_coordinates("a") and ("b_mn_major").
template <int kPitch>
CUTLASS_FA_DEVICE int lane_offset_down(int lane) {
  return lane % 16 * kPitch + lane / 16 * 16;
}

// The same where the matrices go along the columns first: B with k along the columns, and, transposed, A with k along the rows.
// layouts.py: ldmatrix_coordinates("b") and ("a_mn_major").
template <int kPitch>
CUTLASS_FA_DEVICE int lane_offset_along(int lane) {
  return (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
}

// acc += A B^T over 16 kSteps columns; a: A's rows, lane_offset_down; b: B's rows, lane_offset_along.
template <class Element, int kPitch, int kSteps, int kRowBlocks, int kColumnBlocks>
CUTLASS_FA_DEVICE void multiply_rows(float (&acc)[kRowBlocks][kColumnBlocks][4], char const* a, char const* b) {
  static_assert(kColumnBlocks % 2 == 0, "B comes in blocks of 16 rows");
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a_words[kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) { load_matrix_x4(a_words[i], a + i * 16 * kPitch + step * 32); }
#pragma unroll
    for (int j = 0; j < kColumnBlocks; j += 2) {
      uint32_t b_words[4];
      load_matrix_x4(b_words, b + j * 8 * kPitch + step * 32);
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        mma<Element>(acc[i][j], a_words[i], b_words[0], b_words[1]);
        mma<Element>(acc[i][j + 1], a_words[i], b_words[2], b_words[3]);
      }
    }
  }
}

// acc += A B of 16 k: A in registers, b: B's 16 rows of k, lane_offset_down.
template <class Element, int kRowBlocks, int kColumnBlocks>
CUTLASS_FA_DEVICE void multiply_step(float (&acc)[kRowBlocks][kColumnBlocks][4], uint32_t const (&a_words)[kRowBlocks][4], char const* b) {
#pragma unroll
  for (int j = 0; j + 1 < kColumnBlocks; j += 2) {
    uint32_t b_words[4];
    load_matrix_x4_transposed(b_words, b + j * 16);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
      mma<Element>(acc[i][j], a_words[i], b_words[0], b_words[1]);
      mma<Element>(acc[i][j + 1], a_words[i], b_words[2], b_words[3]);
    }
  }
  if constexpr (kColumnBlocks % 2 == 1) {
    uint32_t b_words[2];  // lanes 0 to 15 name the rows
    load_matrix_x2_transposed(b_words, b + (kColumnBlocks - 1) * 16);
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) { mma<Element>(acc[i][kColumnBlocks - 1], a_words[i], b_words[0], b_words[1]); }
  }
}

// acc += A B over 16 kSteps k: a[step] in registers, b: B's rows of k, lane_offset_down.
template <class Element, int kPitch, int kSteps, int kRowBlocks, int kColumnBlocks>
CUTLASS_FA_DEVICE void multiply_registers(float (&acc)[kRowBlocks][kColumnBlocks][4], uint32_t const (&a_words)[kSteps][kRowBlocks][4],
                                          char const* b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) { multiply_step<Element>(acc, a_words[step], b + step * 16 * kPitch); }
}

// acc += A^T B over 16 kSteps rows of both: a: A's rows of k, lane_offset_along; b: B's rows of k, lane_offset_down.
template <class Element, int kPitchA, int kPitchB, int kSteps, int kRowBlocks, int kColumnBlocks>
CUTLASS_FA_DEVICE void multiply_columns(float (&acc)[kRowBlocks][kColumnBlocks][4], char const* a, char const* b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a_words[kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) { load_matrix_x4_transposed(a_words[i], a + step * 16 * kPitchA + i * 32); }
    multiply_step<Element>(acc, a_words, b + step * 16 * kPitchB);
  }
}

// A row of blocks of an accumulator, r = 0 or 1 (8 rows below): the columns before `end`, counted from the lane's first, become `value`.
template <int kColumnBlocks>
CUTLASS_FA_DEVICE void set_columns_before(float (&acc)[kColumnBlocks][4], int r, int end, float value) {
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
    if (8 * j < end) { acc[j][2 * r] = value; }
    if (8 * j + 1 < end) { acc[j][2 * r + 1] = value; }
  }
}

// The same for the columns from `begin` on.
template <int kColumnBlocks>
CUTLASS_FA_DEVICE void set_columns_from(float (&acc)[kColumnBlocks][4], int r, int begin, float value) {
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
    if (8 * j >= begin) { acc[j][2 * r] = value; }
    if (8 * j + 1 >= begin) { acc[j][2 * r + 1] = value; }
  }
}

// A operands of kSteps times 16 k from rows in shared memory; a: A's rows, lane_offset_down.
template <int kPitch, int kSteps, int kRowBlocks>
CUTLASS_FA_DEVICE void load_operand(uint32_t (&a_words)[kSteps][kRowBlocks][4], char const* a) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) { load_matrix_x4(a_words[step][i], a + i * 16 * kPitch + step * 32); }
  }
}

// The same as a thread left them: 16 bytes for each block, `stride` slots apart.
template <int kSteps, int kRowBlocks>
CUTLASS_FA_DEVICE void load_operand_slots(uint32_t (&a_words)[kSteps][kRowBlocks][4], uint4 const* slots, int stride) {
#pragma unroll
  for (int n = 0; n < kSteps * kRowBlocks; ++n) {
    uint4 const packed = slots[n * stride];
    uint32_t(&words)[4] = a_words[n / kRowBlocks][n % kRowBlocks];
    words[0] = packed.x;
    words[1] = packed.y;
    words[2] = packed.z;
    words[3] = packed.w;
  }
}

}  // namespace cutlass_fa
