// SPDX-License-Identifier: BSD-3-Clause
// How a producer that takes tiles from a counter tells its consumers which.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/pipeline.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// One index at a time, in shared memory.
struct TileQueue {
  Mbarrier full;   // the producer has written `index`
  Mbarrier empty;  // every consumer warp has read it
  int index;

  CUTLASS_FA_DEVICE void init(int consumer_warps) {
    full.init(1);
    empty.init(consumer_warps);
  }

  CUTLASS_FA_DEVICE void put(PipelineState<1>& pipe, int next) {
    empty.wait(pipe.parity() ^ 1);
    index = next;
    full.arrive();
    pipe.advance();
  }

  CUTLASS_FA_DEVICE int get(PipelineState<1>& pipe) {
    full.wait(pipe.parity());
    int const next = index;
    warp_sync();  // all lanes have read before one of them says so
    if (thread_index() % kWarpSize == 0) { empty.arrive(); }
    pipe.advance();
    return next;
  }
};

}  // namespace cutlass_fa
