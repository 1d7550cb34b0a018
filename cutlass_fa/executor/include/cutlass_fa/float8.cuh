// SPDX-License-Identifier: BSD-3-Clause
// Host twin of float8.cuh.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

struct float8_e4m3 {
  unsigned char bits;
};
struct float8_e5m2 {
  unsigned char bits;
};

CUTLASS_FA_DEVICE uint32_t pack4_e4m3(float x0, float x1, float x2, float x3) {
  return executor::e4m3_bits(x0) | executor::e4m3_bits(x1) << 8 | executor::e4m3_bits(x2) << 16 | executor::e4m3_bits(x3) << 24;
}

}  // namespace cutlass_fa
