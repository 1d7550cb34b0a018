// SPDX-License-Identifier: BSD-3-Clause
// Host twin of wgmma_fp8.cuh.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/wgmma.cuh>

namespace cutlass_fa {

struct float8_e4m3 {
  unsigned char bits;
};
struct float8_e5m2 {
  unsigned char bits;
};

template <class Element>
constexpr executor::ElementKind wgmma_fp8_element() {
  static_assert(is_same<Element, float8_e4m3> || is_same<Element, float8_e5m2>, "wgmma_fp8 multiplies E4M3 or E5M2");
  return is_same<Element, float8_e4m3> ? executor::ElementKind::kFloat8E4m3 : executor::ElementKind::kFloat8E5m2;
}

template <class ElementA, class ElementB, int kSize>
CUTLASS_FA_DEVICE void wgmma_fp8_ss(float (&d)[kSize], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate, CUTLASS_FA_SITE) {
  static_assert(kSize % 16 == 0 && kSize <= 128, "wgmma_fp8.cuh has shapes of N = 32, 64 .. 256");
  constexpr auto kA = wgmma_fp8_element<ElementA>();
  constexpr auto kB = wgmma_fp8_element<ElementB>();
  executor::wgmma({d, 2 * kSize, nullptr, descriptor_a, descriptor_b, kA, kB, false, accumulate}, site);
}

template <class ElementA, class ElementB, int kSize>
CUTLASS_FA_DEVICE void wgmma_fp8_rs(float (&d)[kSize], uint32_t const* a, uint64_t descriptor_b, bool accumulate, CUTLASS_FA_SITE) {
  static_assert(kSize % 16 == 0 && kSize <= 128, "wgmma_fp8.cuh has shapes of N = 32, 64 .. 256");
  constexpr auto kA = wgmma_fp8_element<ElementA>();
  constexpr auto kB = wgmma_fp8_element<ElementB>();
  executor::wgmma({d, 2 * kSize, a, 0, descriptor_b, kA, kB, false, accumulate}, site);
}

}  // namespace cutlass_fa
