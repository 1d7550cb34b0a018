// SPDX-License-Identifier: BSD-3-Clause
// A tile of bytes transposed in shared memory: V as TMA delivers it, a key a row, becomes V^T, whose rows have the keys side by side, as
// products of 8-bit numbers must have what they sum over.
//
// ldmatrix transposes pairs of bytes. Words of two matrices, 8 keys apart, are then sorted into even and odd columns, and stmatrix writes
// them: 16 keys and 16 columns are two of each, and four byte permutes are all the arithmetic of 32 keys. Both orders that come out of this
// are what the kernel wants (layouts.py: kv_order, column_order): keys as the operand P has them, and columns so that a thread of the
// accumulator has four neighbours of every 16.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/bytes.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/stmatrix.cuh>

namespace cutlass_fa {

constexpr int kTransposedSwizzleBytes = 32;  // of V^T: chunks of 32 keys, so that any multiple of 32 keys fits

// Columns [first_column, end_column) of one block, by one warp. rows: SwizzledTile(kKeys, kColumns, kSwizzleBytes, 1); columns: of
// SwizzledTile(kColumns, kKeys, 32, 1). first_column and end_column are multiples of 16. Eight rows of either are 16 bytes each in eight
// different places of the 128 that the banks span.
template <int kKeys, int kColumns, int kSwizzleBytes>
CUTLASS_FA_DEVICE void transpose_block(char const* rows, char* columns, int first_column, int end_column) {
  int const lane = thread_index() % kWarpSize;
  int const row = lane * kSwizzleBytes, row_swizzle = row >> 3 & (kSwizzleBytes - 16);  // key `lane` of a group of 32
  int const place = lane % 16 * kTransposedSwizzleBytes + lane / 16 * 16;               // column lane % 16 of 16, keys from 16 (lane / 16) on
  char* const to = columns + (place ^ (place >> 3 & (kTransposedSwizzleBytes - 16)));
#pragma unroll 1
  for (int column = first_column; column < end_column; column += 16) {
    char const* const from = rows + column / kSwizzleBytes * (kKeys * kSwizzleBytes) + row + (column % kSwizzleBytes ^ row_swizzle);
#pragma unroll
    for (int key = 0; key < kKeys; key += 32) {
      uint32_t pairs[4];  // matrix m: keys 8 m to 8 m + 7; this lane's: two keys of two columns
      load_matrix_x4_transposed(pairs, from + key * kSwizzleBytes);
      uint32_t const quads[4] = {even_bytes(pairs[0], pairs[1]), odd_bytes(pairs[0], pairs[1]),  // four keys of one column
                                 even_bytes(pairs[2], pairs[3]), odd_bytes(pairs[2], pairs[3])};
      store_matrix_x4(to + key * kColumns + column * kTransposedSwizzleBytes, quads);
    }
  }
}

}  // namespace cutlass_fa
