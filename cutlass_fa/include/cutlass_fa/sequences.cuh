// SPDX-License-Identifier: BSD-3-Clause
// Packed sequences: one after the other in arrays without a batch dimension, sequence b from row cu_seqlens[b] to cu_seqlens[b + 1].
//
// Lengths are known to the device alone. What a kernel reads is clamped to the arrays, so that wrong numbers give wrong results and touch
// nothing else.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

constexpr int kSequenceEdge = 1 << 30;  // where tensor maps of sequences and pages end: tma.py's SEQUENCE_EDGE

struct Sequence {
  int first;  // its first row in the packed array
  int rows;   // how many rows are its own
  int used;   // of which the first so many hold data (seqused; default: all)
};

// index `batch` stands for the rows after the last sequence, of which none is used.
// cu_seqlens null: the sequences own equally many rows.
CUTLASS_FA_DEVICE Sequence sequence_of(int const* cu_seqlens, int const* seqused, int batch, int total, int index) {
  int const equal = cu_seqlens == nullptr ? total / batch : 0;
  int const first = cu_seqlens == nullptr ? index * equal : min(max(cu_seqlens[index], 0), total);
  int const next = index == batch ? total : cu_seqlens == nullptr ? first + equal : cu_seqlens[index + 1];
  int const end = min(max(next, first), total);
  int const rows = end - first;
  int const used = index == batch ? 0 : seqused == nullptr ? rows : min(max(seqused[index], 0), rows);
  return {first, rows, used};
}

// A block of rows of a sequence, as the list of all blocks has it.
struct SequenceBlock {
  int sequence;
  int block;
};

// The list: how many blocks there are (and a number that is not used), then the blocks.
CUTLASS_FA_DEVICE int block_count(int const* list) { return list[0]; }
CUTLASS_FA_DEVICE SequenceBlock block_of(int const* list, int index) { return {list[2 + 2 * index], list[3 + 2 * index]}; }

// Workspaces have a place for each block of block_rows rows of each sequence, wherever sequences end: block 0 of a sequence that begins at
// row `first` has this one. (As FlashAttention-2 pads its packed workspaces, in blocks.)
CUTLASS_FA_DEVICE int place_of_block(int first, int sequence, int block_rows) { return first / block_rows + sequence; }

// The sequence and block that a place is of; the block may be none of the sequence's.
CUTLASS_FA_DEVICE SequenceBlock block_at_place(int const* cu_seqlens, int batch, int total, int block_rows, int place) {
  int sequence = 0;
  for (int end = batch + 1; end - sequence > 1;) {  // the answer is in [sequence, end)
    int const middle = (sequence + end) / 2;
    bool const is_before = place_of_block(min(max(cu_seqlens[middle], 0), total), middle, block_rows) <= place;
    (is_before ? sequence : end) = middle;
  }
  return {sequence, place - place_of_block(min(max(cu_seqlens[sequence], 0), total), sequence, block_rows)};
}

// A row among those of all sequences.
struct SequenceRow {
  int sequence;  // `batch`: behind the last
  int index;     // in its sequence
  int place;     // in the array's dimension of rows: of packed sequences the row itself
};

// cu_seqlens null: an array with a batch dimension, whose sequences have equally many rows.
CUTLASS_FA_DEVICE SequenceRow sequence_row(int const* cu_seqlens, int batch, int total, int row) {
  if (cu_seqlens == nullptr) {
    int const rows = total / batch, sequence = row / rows, index = row - sequence * rows;
    return {sequence, index, index};
  }
  int sequence = 0;
  for (int end = batch + 1; end - sequence > 1;) {  // the answer is in [sequence, end)
    int const middle = (sequence + end) / 2;
    (min(max(cu_seqlens[middle], 0), total) <= row ? sequence : end) = middle;
  }
  return {sequence, row - min(max(cu_seqlens[sequence], 0), total), row};
}

}  // namespace cutlass_fa
