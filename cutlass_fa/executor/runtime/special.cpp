// SPDX-License-Identifier: BSD-3-Clause
// Special functions with the accuracy of the hardware's units: results moved about within the documented error.
// PTX ISA: ex2.approx.ftz.f32 (2 ulp), lg2.approx.ftz.f32 (2^-22 absolute near 1, 2 ulp elsewhere), rcp.approx.ftz.f32 (1 ulp), cvt.rn.
#include <cmath>
#include <cstring>

#include "machine.hpp"
#include "operands.hpp"

namespace cutlass_fa::executor {
namespace {

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// One ulp up, down or none: with the half ulp of the C library's own error, inside the two that the hardware may be off. A function of
// the argument, as on the hardware: the same input gives the same output in every thread.
float moved(float result, float argument) {
  std::uint32_t const bits = bits_of(result);
  if (result == 0.0f || result == 1.0f || !std::isfinite(result)) { return result; }
  std::uint32_t const draw = (bits_of(argument) * 0x9E3779B9u) >> 30;
  return float_of(bits + (draw == 1) - (draw == 2));
}

}  // namespace

float exp2_approx(float x) {
  x = flushed(x);
  return flushed(moved(std::exp2(x), x));
}

float log2_approx(float x) {
  x = flushed(x);
  if (x == 0.0f) { return -INFINITY; }
  return moved(std::log2(x), x);
}

float reciprocal_approx(float x) {
  x = flushed(x);
  return flushed(moved(1.0f / x, x));
}

std::uint32_t bfloat16_bits(float x) {
  std::uint32_t const bits = bits_of(x);
  if (std::isnan(x)) { return 0x7FFF; }
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

std::uint32_t e4m3_bits(float x) {
  std::uint32_t const bits = bits_of(x);
  std::uint32_t const sign = bits >> 24 & 0x80;
  std::uint32_t const magnitude = bits & 0x7FFFFFFF;
  if (std::isnan(x)) { return 0x7F; }
  if (magnitude >= 0x43E00000) { return sign | 0x7E; }  // 448 and above
  if (magnitude < 0x3C800000) {                         // below 2^-6: a subnormal, in units of 2^-9
    return sign | static_cast<std::uint32_t>(std::lrint(std::fabs(static_cast<double>(x)) * 0x1p9));
  }
  std::uint32_t const rebased = magnitude - 0x3C000000;
  return sign | (rebased + 0x7FFFF + (rebased >> 20 & 1)) >> 20;
}

std::uint32_t float16_bits(float x) {
  std::uint32_t const bits = bits_of(x);
  std::uint32_t const sign = bits >> 16 & 0x8000;
  std::uint32_t const magnitude = bits & 0x7FFFFFFF;
  if (std::isnan(x)) { return 0x7FFF; }
  if (magnitude >= 0x477FF000) { return sign | 0x7C00; }  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                           // below 2^-14: a subnormal, in units of 2^-24
    return sign | static_cast<std::uint32_t>(std::lrint(std::fabs(static_cast<double>(x)) * 0x1p24));
  }
  std::uint32_t const rebased = magnitude - 0x38000000;
  return sign | (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13;
}

float float16_value(std::uint32_t bits) { return element_value(ElementKind::kFloat16, bits); }

}  // namespace cutlass_fa::executor
