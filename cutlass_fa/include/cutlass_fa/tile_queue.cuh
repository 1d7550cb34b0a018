// SPDX-License-Identifier: BSD-3-Clause
// How the one that takes tiles from a counter tells the others which.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/pipeline.cuh>

namespace cutlass_fa {

// One item at a time, in shared memory.
template <class Item>
struct WorkQueue {
  Mbarrier full;   // `item` is written
  Mbarrier empty;  // every thread that reads it has
  Item item;

  // Who reads: whole warps, and threads by themselves.
  CUTLASS_FA_DEVICE void init(int warps, int threads = 0) {
    full.init(1);
    empty.init(warps * kWarpSize + threads);
  }

  // Until the item that was put last has been read.
  CUTLASS_FA_DEVICE void wait_until_read(PipelineState<1> const& pipe) { empty.wait(pipe.parity() ^ 1); }

  CUTLASS_FA_DEVICE void put(PipelineState<1>& pipe, Item const& next) {
    wait_until_read(pipe);
    item = next;
    full.arrive();
    pipe.advance();
  }

  // Each thread that reads says so itself: one lane's word for its warp would need an order among the lanes.
  CUTLASS_FA_DEVICE Item get(PipelineState<1>& pipe) {
    full.wait(pipe.parity());
    Item const next = item;
    empty.arrive();
    pipe.advance();
    return next;
  }
};

using TileQueue = WorkQueue<int>;  // of indices of the work list

}  // namespace cutlass_fa
