// SPDX-License-Identifier: BSD-3-Clause
// Host twin of wgmma.cuh. A product in flight owns its accumulators: they hold poison from the issue until pin_registers after the wait.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

enum class Major : int { kK = 0, kMn = 1 };

CUTLASS_FA_DEVICE uint64_t matrix_descriptor(uint64_t layout, void const* pointer) {
  return layout | ((shared_address(pointer) & 0x3FFFF) >> 4);
}

CUTLASS_FA_DEVICE uint64_t advance_descriptor(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

CUTLASS_FA_DEVICE void wgmma_fence(CUTLASS_FA_SITE) { executor::wgmma_fence(site); }

CUTLASS_FA_DEVICE void wgmma_commit(CUTLASS_FA_SITE) { executor::wgmma_commit(site); }

template <int kPending>
CUTLASS_FA_DEVICE void wgmma_wait(CUTLASS_FA_SITE) {
  executor::wgmma_wait(kPending, site);
}

template <int kSize>
CUTLASS_FA_DEVICE void pin_registers(float (&registers)[kSize], CUTLASS_FA_SITE) {
  executor::pin_registers(reinterpret_cast<uint32_t*>(registers), kSize, site);
}
template <int kSize>
CUTLASS_FA_DEVICE void pin_registers(uint32_t (&registers)[kSize], CUTLASS_FA_SITE) {
  executor::pin_registers(registers, kSize, site);
}

template <int kSize>
CUTLASS_FA_DEVICE void take_operand(uint32_t (&p)[kSize], uint32_t const (&next_p)[kSize], CUTLASS_FA_SITE) {
  for (int i = 0; i < kSize; ++i) { p[i] = next_p[i]; }
  pin_registers(p, site);
}

template <class Element>
constexpr executor::ElementKind wgmma_element() {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "wgmma multiplies bf16 or f16");
  return is_same<Element, bfloat16> ? executor::ElementKind::kBfloat16 : executor::ElementKind::kFloat16;
}

template <class Element, Major kMajorB, int kSize>
CUTLASS_FA_DEVICE void wgmma_ss(float (&d)[kSize], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate, CUTLASS_FA_SITE) {
  static_assert(kSize % 8 == 0 && kSize <= 128, "wgmma.cuh has shapes of N = 16, 32 .. 256");
  constexpr auto kElement = wgmma_element<Element>();
  executor::wgmma({d, 2 * kSize, nullptr, descriptor_a, descriptor_b, kElement, kElement, kMajorB == Major::kMn, accumulate}, site);
}

template <class Element, Major kMajorB, int kSize>
CUTLASS_FA_DEVICE void wgmma_rs(float (&d)[kSize], uint32_t const* a, uint64_t descriptor_b, bool accumulate, CUTLASS_FA_SITE) {
  static_assert(kSize % 8 == 0 && kSize <= 128, "wgmma.cuh has shapes of N = 16, 32 .. 256");
  constexpr auto kElement = wgmma_element<Element>();
  executor::wgmma({d, 2 * kSize, a, 0, descriptor_b, kElement, kElement, kMajorB == Major::kMn, accumulate}, site);
}

template <class Element, Major kMajorB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_ss_steps(float (&d)[kSize], uint64_t descriptor_a, int const (&bytes_a)[kSteps], uint64_t descriptor_b,
                                      int const (&bytes_b)[kSteps], bool accumulate, CUTLASS_FA_SITE) {
  for (int step = 0; step < kSteps; ++step) {
    wgmma_ss<Element, kMajorB>(d, advance_descriptor(descriptor_a, bytes_a[step]), advance_descriptor(descriptor_b, bytes_b[step]),
                               accumulate || step > 0, site);
  }
}

template <class Element, Major kMajorB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_rs_steps(float (&d)[kSize], uint32_t const (&a)[4 * kSteps], uint64_t descriptor_b,
                                      int const (&bytes_b)[kSteps], bool accumulate, CUTLASS_FA_SITE) {
  for (int step = 0; step < kSteps; ++step) {
    wgmma_rs<Element, kMajorB>(d, a + 4 * step, advance_descriptor(descriptor_b, bytes_b[step]), accumulate || step > 0, site);
  }
}

}  // namespace cutlass_fa
