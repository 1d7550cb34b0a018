// SPDX-License-Identifier: BSD-3-Clause
// Exchanges between the lanes of one warp. All 32 lanes take part in each.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

template <class T>
CUTLASS_FA_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The value of a lane that each lane names.
template <class T>
CUTLASS_FA_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Until all lanes are here; what they wrote before is visible to each other after.
CUTLASS_FA_DEVICE void warp_sync() { __syncwarp(); }

// Lane 0's value; tells the compiler that the result is the same in the whole warp.
CUTLASS_FA_DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Whether the condition holds in some lane.
CUTLASS_FA_DEVICE bool warp_any(bool condition) { return __any_sync(0xffffffffu, condition); }

// The four lanes 4q .. 4q+3 hold one row of a tensor-core accumulator between them.
CUTLASS_FA_DEVICE float quad_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 2));
  return fmaxf(value, shuffle_xor(value, 1));
}

CUTLASS_FA_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 2);
  return value + shuffle_xor(value, 1);
}

// Whether the condition holds in some lane of the quad.
CUTLASS_FA_DEVICE bool quad_any(bool condition) { return quad_max(condition ? 1.0f : 0.0f) != 0.0f; }

// The sum over all lanes, in each of them; always in the same order.
CUTLASS_FA_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) { value += shuffle_xor(value, distance); }
  return value;
}

CUTLASS_FA_DEVICE int warp_sum(int value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) { value += shuffle_xor(value, distance); }
  return value;
}

// The sum over this lane and those before it (Hillis and Steele 1986).
CUTLASS_FA_DEVICE int warp_running_sum(int value) {
  int const lane = static_cast<unsigned>(thread_index()) % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    int const before = shuffle(value, max(lane - distance, 0));
    value += lane >= distance ? before : 0;
  }
  return value;
}

// 4 x 4 transpose of words inside each quad: lane i's word j becomes lane j's word i.
CUTLASS_FA_DEVICE void quad_transpose(uint32_t (&word)[4], int quad_lane) {
  bool const odd = quad_lane & 1;
  uint32_t const a = shuffle_xor(odd ? word[0] : word[1], 1);
  uint32_t const b = shuffle_xor(odd ? word[2] : word[3], 1);
  (odd ? word[0] : word[1]) = a;
  (odd ? word[2] : word[3]) = b;
  bool const upper = quad_lane & 2;
  uint32_t const c = shuffle_xor(upper ? word[0] : word[2], 2);
  uint32_t const d = shuffle_xor(upper ? word[1] : word[3], 2);
  (upper ? word[0] : word[2]) = c;
  (upper ? word[1] : word[3]) = d;
}

}  // namespace cutlass_fa
