// SPDX-License-Identifier: BSD-3-Clause
// Work divided equally among the CTAs of a grid, where only the device knows how much there is.
//
// The work is a line of blocks: sequence after sequence, of each its heads, of each head its tiles, of each tile the blocks of keys that it
// sees, or one where it sees none. CTAs have equal shares of the line, one after the other (as Stream-K divides matrix products: Osama et
// al. 2023), so that all end together and no list is needed to find a place. A tile of which several CTAs have blocks is divided into parts.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

constexpr int kLeastShare = 2;  // blocks: a part costs a write and a read of partial results; not timed

// Which of the line's blocks a CTA has.
struct Share {
  int size;        // of every CTA but the last ones
  int begin, end;  // this CTA's
};

CUTLASS_FA_DEVICE Share share_of(int total) {
  int const size = max((total + grid_size() - 1) / grid_size(), kLeastShare), begin = block_index() * size;
  return {size, begin, min(begin + size, total)};
}

// Some of the key blocks of a tile, of which one CTA makes a partial result.
struct Part {
  int begin, end;   // [begin, end) of the key blocks that the tile sees
  int part, parts;  // of the tile, whose first blocks are part 0
  int arrivals;     // with the last part that this CTA has of the tile: how many it has; else 0
  int first_cta;    // which CTA has the tile's first block
};

// Calls put(part) for each part that this CTA has of the tile whose `blocks` blocks are in the line from `at` on; it sees `seen` of them.
// num_splits 0: what the share has of the tile is a part. Else a tile has as many parts, of equal size, wherever shares end, and a part
// belongs to the CTA whose share has its first block.
template <class Put>
CUTLASS_FA_DEVICE void for_each_part(Share const& share, int at, int blocks, int seen, int num_splits, Put put) {
  int const first_cta = at / share.size;
  if (num_splits == 0) {
    int const begin = min(max(share.begin - at, 0), seen), end = min(share.end - at, seen);
    put(Part{begin, end, block_index() - first_cta, (at + blocks - 1) / share.size - first_cta + 1, 1, first_cta});
    return;
  }
  int const parts = min(num_splits, blocks), size = blocks / parts, larger = blocks - size * parts;  // so many have a block more
  for (int part = 0, begin = 0, end = 0, own = 0; part < parts; ++part, begin = end) {
    end = begin + size + (part < larger ? 1 : 0);
    if (at + begin < share.begin || at + begin >= share.end) { continue; }
    ++own;
    bool const is_own_last = part + 1 == parts || at + end >= share.end;
    put(Part{begin, min(end, seen), part, parts, is_own_last ? own : 0, first_cta});
  }
}

// A sequence's place in the line.
struct PlacedSequence {
  int sequence;
  int at, blocks;  // its first block in the line, and how many it has there
};

// A warp's way along the line: its lanes have 32 sequences side by side. BlocksOf: sequence -> how many blocks it has, 0 behind the last.
template <class BlocksOf>
struct SequenceWalk {
  BlocksOf blocks_of;
  int first, before;      // lane 0's sequence, and the line's blocks before it
  int blocks, up_to_its;  // of the lane's sequence, and of the lanes' sequences up to this one

  CUTLASS_FA_DEVICE void look(int from, int blocks_before) {
    first = from;
    before = blocks_before;
    blocks = blocks_of(first + thread_index() % kWarpSize);
    up_to_its = warp_running_sum(blocks);
  }

  // The sequence that has the line's `position`, which never goes back and is not behind the line's end.
  CUTLASS_FA_DEVICE PlacedSequence find(int position) {
    for (int last = kWarpSize - 1, next = before + shuffle(up_to_its, last); next <= position; next = before + shuffle(up_to_its, last)) {
      look(first + kWarpSize, next);
    }
    int const lane = warp_sum(before + up_to_its <= position ? 1 : 0);  // the first whose sequence ends behind the position
    return {first + lane, before + shuffle(up_to_its - blocks, lane), shuffle(blocks, lane)};
  }
};

template <class BlocksOf>
CUTLASS_FA_DEVICE SequenceWalk<BlocksOf> walk_sequences(BlocksOf blocks_of) {
  SequenceWalk<BlocksOf> walk = {blocks_of, 0, 0, 0, 0};
  walk.look(0, 0);
  return walk;
}

// The line's length, by a warp.
template <class BlocksOf>
CUTLASS_FA_DEVICE int sum_over_sequences(int sequences, BlocksOf blocks_of) {
  int total = 0;
  for (int sequence = thread_index() % kWarpSize; sequence < sequences; sequence += kWarpSize) { total += blocks_of(sequence); }
  return warp_sum(total);
}

}  // namespace cutlass_fa
