// SPDX-License-Identifier: BSD-3-Clause
// Special functions at the hardware's accuracy, and conversions between float and 16-bit pairs.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2E = 1.4426950408889634f;

CUTLASS_FA_DEVICE float negative_infinity() { return __int_as_float(0xff800000); }

// 2^x by the special-function unit (2 ulp); denormal results flush to 0, 2^-inf = 0.
CUTLASS_FA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) by the special-function unit; log2(0) = -inf.
CUTLASS_FA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x by the special-function unit (1 ulp); 1 / inf = 0.
CUTLASS_FA_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x) = 1 - 2 / (1 + e^2x), within 3e-7: a thousand times closer than the unit's own tanh, whose error a cap would multiply.
CUTLASS_FA_DEVICE float tanh_approx(float x) { return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(x * 2.8853900817779268f)); }

// Two floats rounded to nearest even; `low` goes to the lower 16 bits, which is the lower address.
template <class Element>
CUTLASS_FA_DEVICE uint32_t pack2(float low, float high) {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "pack2 makes bf16 or f16 pairs");
  uint32_t pair;
  if constexpr (is_same<Element, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// A word whose lowest `count` bits are set: none below 1, all from 32 on.
CUTLASS_FA_DEVICE uint32_t low_bits(int count) { return count >= 32 ? 0xffffffffu : (1u << max(count, 0)) - 1u; }

// The two floats of a pair, exactly; x is the lower half.
template <class Element>
CUTLASS_FA_DEVICE float2 unpack2(uint32_t pair) {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "unpack2 takes bf16 or f16 pairs");
  if constexpr (is_same<Element, bfloat16>) {
    return make_float2(__int_as_float(static_cast<int>(pair << 16)), __int_as_float(static_cast<int>(pair & 0xffff0000u)));
  } else {
    float low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(pair));
    return make_float2(low, high);
  }
}

}  // namespace cutlass_fa
