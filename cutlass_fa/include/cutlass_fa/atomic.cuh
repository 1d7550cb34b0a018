// SPDX-License-Identifier: BSD-3-Clause
// Atomic operations on global and shared memory.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Adds `value` and returns what was there before; relaxed order, visible to the whole GPU.
CUTLASS_FA_DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }

// The same in order (acquire and release, of the whole GPU): what this thread knew to be written before is visible to whoever sees the
// addition this way, and what those knew who added before is visible to this thread; a barrier passes it on to the CTA's other threads.
CUTLASS_FA_DEVICE int atomic_add_in_order(int* address, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

// In shared memory, in relaxed order, visible to the CTA.
CUTLASS_FA_DEVICE int shared_atomic_add(int* address, int value) { return atomicAdd(address, value); }

// Adds without telling what was there, so that the addition happens in the L2 cache; the order of several additions is not fixed.
CUTLASS_FA_DEVICE void atomic_add(float* address, float value) { atomicAdd(address, value); }

// Four neighbouring floats at a multiple of 16 bytes, in one request (sm_90 and up); each addition is atomic by itself.
CUTLASS_FA_DEVICE void atomic_add(float* address, float4 value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}

}  // namespace cutlass_fa
