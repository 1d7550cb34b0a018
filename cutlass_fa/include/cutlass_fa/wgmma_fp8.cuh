// SPDX-License-Identifier: BSD-3-Clause
// WGMMA on 8-bit floats: D[64, N] += A[64, 32] B[32, N], asynchronous as in wgmma.cuh, whose fences, commits, waits and pins serve here.
//
// A and B are E4M3 or E5M2, each its own; both are K-major, the only order the hardware reads them in. Sums are kept with fewer bits than
// float32 has: about 14 of mantissa on Hopper, so that long sums want a second accumulator.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/float8.cuh>
#include <cutlass_fa/wgmma.cuh>

namespace cutlass_fa {

// One struct per N, filled in by the macro below.
template <int kN>
struct WgmmaFp8Shape;

// Issue D (+)= A B for one k-step of 32. `accumulate` false overwrites D.
template <class ElementA, class ElementB, int kSize>
CUTLASS_FA_DEVICE void wgmma_fp8_ss(float (&d)[kSize], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
  WgmmaFp8Shape<2 * kSize>::template ss<ElementA, ElementB>(d, descriptor_a, descriptor_b, accumulate);
}

// As wgmma_fp8_ss; a: four registers of A, each four neighbouring k: register i of lane l holds row l / 4 + 8 (i % 2) of its warp's 16,
// k = 16 (i / 2) + 4 (l % 4) to 3 further (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk32").
template <class ElementA, class ElementB, int kSize>
CUTLASS_FA_DEVICE void wgmma_fp8_rs(float (&d)[kSize], uint32_t const* a, uint64_t descriptor_b, bool accumulate) {
  WgmmaFp8Shape<2 * kSize>::template rs<ElementA, ElementB>(d, a, descriptor_b, accumulate);
}

// All k-steps of a product, as wgmma.cuh's wgmma_ss_steps.
template <class ElementA, class ElementB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_fp8_ss_steps(float (&d)[kSize], uint64_t descriptor_a, int const (&bytes_a)[kSteps], uint64_t descriptor_b,
                                          int const (&bytes_b)[kSteps], bool accumulate) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_fp8_ss<ElementA, ElementB>(d, advance_descriptor(descriptor_a, bytes_a[step]), advance_descriptor(descriptor_b, bytes_b[step]),
                                     accumulate || step > 0);
  }
}

// As wgmma_fp8_ss_steps; a: four registers for each step.
template <class ElementA, class ElementB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_fp8_rs_steps(float (&d)[kSize], uint32_t const (&a)[4 * kSteps], uint64_t descriptor_b,
                                          int const (&bytes_b)[kSteps], bool accumulate) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_fp8_rs<ElementA, ElementB>(d, a + 4 * step, advance_descriptor(descriptor_b, bytes_b[step]), accumulate || step > 0);
  }
}

// clang-format off
#define CUTLASS_FA_WGMMA_FP8_SS(N, GROUPS, TYPES, A, B, P)                                                                            \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPES                      \
               " {" CUTLASS_FA_LISTS_##GROUPS "}, %" #A ", %" #B ", p, 1, 1;}"                                                        \
               : CUTLASS_FA_EIGHTS_##GROUPS                                                                                           \
               : "l"(descriptor_a), "l"(descriptor_b), "r"(static_cast<int>(accumulate)))
#define CUTLASS_FA_WGMMA_FP8_RS(N, GROUPS, TYPES, A0, A1, A2, A3, B, P)                                                               \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPES                      \
               " {" CUTLASS_FA_LISTS_##GROUPS "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1;}"                          \
               : CUTLASS_FA_EIGHTS_##GROUPS                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b), "r"(static_cast<int>(accumulate)))

// I0 .. I5: the numbers of the operands after the accumulator's N / 2 registers.
#define CUTLASS_FA_WGMMA_FP8_SHAPE(N, GROUPS, I0, I1, I2, I3, I4, I5)                                                                 \
  template <>                                                                                                                         \
  struct WgmmaFp8Shape<N> {                                                                                                           \
    template <class ElementA, class ElementB>                                                                                         \
    CUTLASS_FA_DEVICE static void ss(float (&d)[N / 2], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {              \
      if constexpr (is_same<ElementA, float8_e4m3> && is_same<ElementB, float8_e4m3>) {                                               \
        CUTLASS_FA_WGMMA_FP8_SS(N, GROUPS, "e4m3.e4m3", I0, I1, I2);                                                                  \
      } else if constexpr (is_same<ElementA, float8_e4m3>) {                                                                          \
        CUTLASS_FA_WGMMA_FP8_SS(N, GROUPS, "e4m3.e5m2", I0, I1, I2);                                                                  \
      } else if constexpr (is_same<ElementB, float8_e4m3>) {                                                                          \
        CUTLASS_FA_WGMMA_FP8_SS(N, GROUPS, "e5m2.e4m3", I0, I1, I2);                                                                  \
      } else {                                                                                                                        \
        CUTLASS_FA_WGMMA_FP8_SS(N, GROUPS, "e5m2.e5m2", I0, I1, I2);                                                                  \
      }                                                                                                                               \
    }                                                                                                                                 \
    template <class ElementA, class ElementB>                                                                                         \
    CUTLASS_FA_DEVICE static void rs(float (&d)[N / 2], uint32_t const* a, uint64_t descriptor_b, bool accumulate) {                  \
      if constexpr (is_same<ElementA, float8_e4m3> && is_same<ElementB, float8_e4m3>) {                                               \
        CUTLASS_FA_WGMMA_FP8_RS(N, GROUPS, "e4m3.e4m3", I0, I1, I2, I3, I4, I5);                                                      \
      } else if constexpr (is_same<ElementA, float8_e4m3>) {                                                                          \
        CUTLASS_FA_WGMMA_FP8_RS(N, GROUPS, "e4m3.e5m2", I0, I1, I2, I3, I4, I5);                                                      \
      } else if constexpr (is_same<ElementB, float8_e4m3>) {                                                                          \
        CUTLASS_FA_WGMMA_FP8_RS(N, GROUPS, "e5m2.e4m3", I0, I1, I2, I3, I4, I5);                                                      \
      } else {                                                                                                                        \
        CUTLASS_FA_WGMMA_FP8_RS(N, GROUPS, "e5m2.e5m2", I0, I1, I2, I3, I4, I5);                                                      \
      }                                                                                                                               \
    }                                                                                                                                 \
  };

CUTLASS_FA_WGMMA_FP8_SHAPE(32, 2, 16, 17, 18, 19, 20, 21)
CUTLASS_FA_WGMMA_FP8_SHAPE(64, 4, 32, 33, 34, 35, 36, 37)
CUTLASS_FA_WGMMA_FP8_SHAPE(96, 6, 48, 49, 50, 51, 52, 53)
CUTLASS_FA_WGMMA_FP8_SHAPE(128, 8, 64, 65, 66, 67, 68, 69)
CUTLASS_FA_WGMMA_FP8_SHAPE(160, 10, 80, 81, 82, 83, 84, 85)
CUTLASS_FA_WGMMA_FP8_SHAPE(192, 12, 96, 97, 98, 99, 100, 101)
CUTLASS_FA_WGMMA_FP8_SHAPE(224, 14, 112, 113, 114, 115, 116, 117)
CUTLASS_FA_WGMMA_FP8_SHAPE(256, 16, 128, 129, 130, 131, 132, 133)
// clang-format on

}  // namespace cutlass_fa
