// SPDX-License-Identifier: BSD-3-Clause
// Computing something again instead of keeping it in registers.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// The same value, of which the compiler does not know that it has seen it before: what follows from it is computed anew.
CUTLASS_FA_DEVICE int without_history(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace cutlass_fa
