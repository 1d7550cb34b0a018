// SPDX-License-Identifier: BSD-3-Clause
// 8-bit floating-point numbers: storage, and the conversion to them.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// E4M3: largest 448, smallest 2^-9, no infinity. E5M2: largest 57344, smallest 2^-16.
struct float8_e4m3 {
  unsigned char bits;
};
struct float8_e5m2 {
  unsigned char bits;
};

// Four floats rounded to nearest even E4M3; x0 goes to the lowest byte. What is larger than 448 in size becomes 448, NaN stays NaN.
CUTLASS_FA_DEVICE uint32_t pack4_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t word;
  asm("{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; mov.b32 %0, {low, high};}"
      : "=r"(word)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return word;
}

}  // namespace cutlass_fa
