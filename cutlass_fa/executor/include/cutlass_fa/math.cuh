// SPDX-License-Identifier: BSD-3-Clause
// Host twin of math.cuh.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2E = 1.4426950408889634f;

CUTLASS_FA_DEVICE float negative_infinity() { return __int_as_float(0xff800000); }

CUTLASS_FA_DEVICE float exp2_approx(float x) { return executor::exp2_approx(x); }

CUTLASS_FA_DEVICE float log2_approx(float x) { return executor::log2_approx(x); }

CUTLASS_FA_DEVICE float reciprocal_approx(float x) { return executor::reciprocal_approx(x); }

CUTLASS_FA_DEVICE float tanh_approx(float x) { return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(x * 2.8853900817779268f)); }

template <class Element>
CUTLASS_FA_DEVICE uint32_t pack2(float low, float high) {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "pack2 makes bf16 or f16 pairs");
  if constexpr (is_same<Element, bfloat16>) {
    return executor::bfloat16_bits(low) | executor::bfloat16_bits(high) << 16;
  } else {
    return executor::float16_bits(low) | executor::float16_bits(high) << 16;
  }
}

CUTLASS_FA_DEVICE uint32_t low_bits(int count) { return count >= 32 ? 0xffffffffu : (1u << max(count, 0)) - 1u; }

template <class Element>
CUTLASS_FA_DEVICE float2 unpack2(uint32_t pair) {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "unpack2 takes bf16 or f16 pairs");
  if constexpr (is_same<Element, bfloat16>) {
    return make_float2(__int_as_float(static_cast<int>(pair << 16)), __int_as_float(static_cast<int>(pair & 0xffff0000u)));
  } else {
    return make_float2(executor::float16_value(pair & 0xFFFF), executor::float16_value(pair >> 16));
  }
}

}  // namespace cutlass_fa
