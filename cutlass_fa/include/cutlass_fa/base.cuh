// SPDX-License-Identifier: BSD-3-Clause
// Words every header and every generated kernel uses: fixed-width integers, function qualifiers, element types, thread coordinates.
#pragma once

#include <cuda/std/cstdint>

#define CUTLASS_FA_DEVICE __device__ __forceinline__

namespace cutlass_fa {

using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;

// 16-bit floating-point numbers as storage; arithmetic happens in float (math.cuh packs pairs of them).
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

struct true_type {
  static constexpr bool value = true;
};
struct false_type {
  static constexpr bool value = false;
};

template <class A, class B>
inline constexpr bool is_same = false;
template <class A>
inline constexpr bool is_same<A, A> = true;

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;

CUTLASS_FA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CUTLASS_FA_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
CUTLASS_FA_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }

CUTLASS_FA_DEVICE void block_sync() { __syncthreads(); }

}  // namespace cutlass_fa
