// SPDX-License-Identifier: BSD-3-Clause
// Blocks of keys that lie in pages of a cache, copied by the lanes of a warp: each has a box of keys that lie in one page.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/sequences.cuh>

namespace cutlass_fa {

// In one array's map (tma.py): from one page to the next and from one key to the next.
struct PageSteps {
  int page, row;
};

// A box's keys.
struct PageRows {
  int page;        // -1: the box has no keys in use
  int begin, end;  // its first key in the page, and the end of the page's keys that are in use
};

// The box whose first key is `key`, counted from the sequence's first page on, of which those before key_end are in use. page_of: index of
// a page of the sequence -> the page. in_block: whether the block has the box at all.
template <class PageOf>
CUTLASS_FA_DEVICE PageRows page_rows(int key, int key_end, int page_size, bool in_block, PageOf page_of) {
  int const index = key / page_size;
  return {in_block && key < key_end ? page_of(index) : -1, key - index * page_size, min(page_size, key_end - index * page_size)};
}

// Where the map has the box. It counts a page's rows so that its last in use comes right before the array's edge: keys behind it arrive as
// zeros, whatever lies there, and so do those of a page that does not exist.
struct MapRow {
  int row, place;
};

CUTLASS_FA_DEVICE MapRow map_row(PageRows const& rows, int num_pages, PageSteps steps) {
  bool const exists = 0 <= rows.page && rows.page < num_pages;  // looked at only here, where the table's answer is waited for
  int const end = exists ? rows.end : 0;
  return {kSequenceEdge - end + rows.begin, exists ? rows.page * steps.page + end * steps.row : 0};
}

}  // namespace cutlass_fa
