// SPDX-License-Identifier: BSD-3-Clause
// Rows of 16-bit elements to a tile in shared memory by cp.async: a group of 128 threads, eight of them for each row.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/rematerialize.cuh>

namespace cutlass_fa {

constexpr int kRowsPerPass = kWarpgroupSize / 8;

// The first 16 bytes that `thread` of the group copies, of a matrix whose rows lie `stride` elements apart.
template <class Element>
CUTLASS_FA_DEVICE Element const* first_unit(Element const* matrix, int stride, int thread) {
  return matrix + static_cast<int64_t>(thread / 8) * stride + thread % 8 * 8;
}

// kRows rows of kColumns elements to a tile of pitch kPitch bytes. source: this thread's first_unit; what lies beyond `rows` rows or
// `columns` columns becomes 0 and is not read. The caller commits and waits.
template <int kRows, int kColumns, int kPitch, class Element>
CUTLASS_FA_DEVICE void copy_rows(char* tile, Element const* source, int stride, int rows, int columns, int group_thread) {
  unsigned const thread = without_history(group_thread);  // row and column are cheaper to compute than to keep
  int const row = thread / 8, column = thread % 8 * 8;
  char* const destination = tile + row * kPitch + column * 2;
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsPerPass) {
    bool const exists = row + first < rows;
#pragma unroll
    for (int c = 0; c < kColumns; c += 64) {
      if (c + 64 <= kColumns || column + c < kColumns) {
        int const bytes = exists && column + c < columns ? 16 : 0;
        cp_async(destination + first * kPitch + c * 2, source + static_cast<int64_t>(first) * stride + c, bytes);
      }
    }
  }
}

}  // namespace cutlass_fa
