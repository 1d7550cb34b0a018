// SPDX-License-Identifier: BSD-3-Clause
// Host twin of wgmma_fp8.cuh.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/float8.cuh>
#include <cutlass_fa/wgmma.cuh>

namespace cutlass_fa {

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

template <class ElementA, class ElementB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_fp8_ss_steps(float (&d)[kSize], uint64_t descriptor_a, int const (&bytes_a)[kSteps], uint64_t descriptor_b,
                                          int const (&bytes_b)[kSteps], bool accumulate, CUTLASS_FA_SITE) {
  for (int step = 0; step < kSteps; ++step) {
    wgmma_fp8_ss<ElementA, ElementB>(d, advance_descriptor(descriptor_a, bytes_a[step]), advance_descriptor(descriptor_b, bytes_b[step]),
                                     accumulate || step > 0, site);
  }
}

template <class ElementA, class ElementB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_fp8_rs_steps(float (&d)[kSize], uint32_t const (&a)[4 * kSteps], uint64_t descriptor_b,
                                          int const (&bytes_b)[kSteps], bool accumulate, CUTLASS_FA_SITE) {
  for (int step = 0; step < kSteps; ++step) {
    wgmma_fp8_rs<ElementA, ElementB>(d, a + 4 * step, advance_descriptor(descriptor_b, bytes_b[step]), accumulate || step > 0, site);
  }
}

}  // namespace cutlass_fa
