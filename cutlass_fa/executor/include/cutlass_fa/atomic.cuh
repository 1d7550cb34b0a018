// SPDX-License-Identifier: BSD-3-Clause
// Host twin of atomic.cuh. One fiber runs at a time, so plain code is atomic.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE int atomic_add(int* address, int value, CUTLASS_FA_SITE) {
  executor::check_atomic(address, sizeof(int), site);
  int const before = *address;
  *address = before + value;
  return before;
}

CUTLASS_FA_DEVICE int atomic_add_in_order(int* address, int value, CUTLASS_FA_SITE) {
  executor::check_atomic(address, sizeof(int), site);
  int const before = *address;
  *address = before + value;
  return before;
}

CUTLASS_FA_DEVICE int shared_atomic_add(int* address, int value, CUTLASS_FA_SITE) { return executor::shared_atomic_add(address, value, site); }

CUTLASS_FA_DEVICE void atomic_add(float* address, float value, CUTLASS_FA_SITE) {
  executor::check_atomic(address, sizeof(float), site);
  *address += value;
}

CUTLASS_FA_DEVICE void atomic_add(float* address, float4 value, CUTLASS_FA_SITE) {
  executor::check_atomic(address, sizeof(float4), site);
  float const terms[4] = {value.x, value.y, value.z, value.w};
  for (int i = 0; i < 4; ++i) { address[i] += terms[i]; }
}

}  // namespace cutlass_fa
