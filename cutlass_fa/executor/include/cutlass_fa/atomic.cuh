// SPDX-License-Identifier: BSD-3-Clause
// Host twin of atomic.cuh: the intrinsics, then the device header's own text over them. One fiber runs at a time, so plain code is atomic.
#pragma once

#include <cutlass_fa/base.cuh>

template <class T>
inline T atomicAdd(T* address, T value, CUTLASS_FA_SITE) {
  cutlass_fa::executor::check_atomic(address, sizeof(T), site);
  T const before = *address;
  *address = before + value;
  return before;
}

#include_next <cutlass_fa/atomic.cuh>
