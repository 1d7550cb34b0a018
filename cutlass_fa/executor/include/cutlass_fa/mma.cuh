// SPDX-License-Identifier: BSD-3-Clause
// Host twin of mma.cuh. The lanes come one after another; the last one multiplies.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

template <class Element>
CUTLASS_FA_DEVICE void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1, CUTLASS_FA_SITE) {
  static_assert(is_same<Element, bfloat16> || is_same<Element, float16>, "mma multiplies bf16 or f16");
  constexpr auto kElement = is_same<Element, bfloat16> ? executor::ElementKind::kBfloat16 : executor::ElementKind::kFloat16;
  executor::mma(d, a, b0, b1, kElement, site);
}

}  // namespace cutlass_fa
