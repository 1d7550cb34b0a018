// SPDX-License-Identifier: BSD-3-Clause
// Where a role stands in a ring of buffers, each of which has a pair of mbarriers.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Which stage of a ring comes next, and the parity of the phase that fills it; in one register.
template <int kStages>
struct PipelineState {
  uint32_t position = 0;  // stage, and kParityBit

  static constexpr uint32_t kParityBit = 1u << 16;

  CUTLASS_FA_DEVICE int stage() const { return static_cast<int>(position % kParityBit); }
  CUTLASS_FA_DEVICE uint32_t parity() const { return position / kParityBit; }

  CUTLASS_FA_DEVICE void advance() {
    ++position;
    if (stage() == kStages) { position = (position - kStages) ^ kParityBit; }
  }
};

}  // namespace cutlass_fa
