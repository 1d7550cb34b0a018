// SPDX-License-Identifier: BSD-3-Clause
// Atomic operations on global memory.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Adds `value` and returns what was there before; relaxed order, visible to the whole GPU.
CUTLASS_FA_DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }

}  // namespace cutlass_fa
