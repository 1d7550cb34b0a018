// SPDX-License-Identifier: BSD-3-Clause
// How the one that takes tiles from a counter tells the others which.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/pipeline.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// One item at a time, in shared memory.
template <class Item>
struct WorkQueue {
  Mbarrier full;   // `item` is written
  Mbarrier empty;  // every reader has read it
  Item item;

  // readers: warps, and threads by themselves.
  CUTLASS_FA_DEVICE void init(int readers) {
    full.init(1);
    empty.init(readers);
  }

  CUTLASS_FA_DEVICE void put(PipelineState<1>& pipe, Item const& next) {
    empty.wait(pipe.parity() ^ 1);
    item = next;
    full.arrive();
    pipe.advance();
  }

  // For a whole warp.
  CUTLASS_FA_DEVICE Item get(PipelineState<1>& pipe) {
    full.wait(pipe.parity());
    Item const next = item;
    warp_sync();  // all lanes have read before one of them says so
    if (thread_index() % kWarpSize == 0) { empty.arrive(); }
    pipe.advance();
    return next;
  }

  // For a thread by itself.
  CUTLASS_FA_DEVICE Item get_alone(PipelineState<1>& pipe) {
    full.wait(pipe.parity());
    Item const next = item;
    empty.arrive();
    pipe.advance();
    return next;
  }
};

using TileQueue = WorkQueue<int>;  // of indices of the work list

}  // namespace cutlass_fa
