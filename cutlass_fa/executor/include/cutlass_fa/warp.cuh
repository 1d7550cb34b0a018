// SPDX-License-Identifier: BSD-3-Clause
// Host twin of warp.cuh: the intrinsics, then the device header's own text over them.
#pragma once

#include <cutlass_fa/base.cuh>

template <class T>
inline T cutlass_fa_shuffle(cutlass_fa::executor::Exchange kind, T value, int operand, cutlass_fa::executor::Site site) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit values");
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = cutlass_fa::executor::exchange(kind, bits, operand, site);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int lane_mask, CUTLASS_FA_SITE) {
  return cutlass_fa_shuffle(cutlass_fa::executor::Exchange::kXor, value, lane_mask, site);
}

template <class T>
inline T __shfl_sync(unsigned, T value, int lane, CUTLASS_FA_SITE) {
  return cutlass_fa_shuffle(cutlass_fa::executor::Exchange::kIndex, value, lane, site);
}

inline void __syncwarp(unsigned = 0xffffffffu, CUTLASS_FA_SITE) {
  cutlass_fa::executor::exchange(cutlass_fa::executor::Exchange::kSync, 0, 0, site);
}

inline unsigned __ballot_sync(unsigned, int condition, CUTLASS_FA_SITE) {
  return cutlass_fa::executor::exchange(cutlass_fa::executor::Exchange::kVote, condition != 0, 0, site);
}
inline int __any_sync(unsigned mask, int condition, CUTLASS_FA_SITE) { return __ballot_sync(mask, condition, site) != 0; }
inline int __all_sync(unsigned mask, int condition, CUTLASS_FA_SITE) { return __ballot_sync(mask, condition, site) == 0xffffffffu; }

#include_next <cutlass_fa/warp.cuh>
