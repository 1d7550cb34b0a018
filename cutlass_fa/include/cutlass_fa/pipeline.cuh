// SPDX-License-Identifier: BSD-3-Clause
// Where a role stands in a ring of buffers, each of which has a pair of mbarriers.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Which stage of a ring comes next, and the parity of the phase that fills it.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  CUTLASS_FA_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace cutlass_fa
