// SPDX-License-Identifier: BSD-3-Clause
// WGMMA: D[64, N] += A[64, 16] B[16, N] by the four warps of a warpgroup, asynchronously, on 16-bit inputs with float accumulators.
//
// B, and A of the _ss form, lie in shared memory and are named by 64-bit matrix descriptors; A of the _rs form lies in registers.
// Results may be read only after wgmma_commit and wgmma_wait. CuTe names one struct per shape, with as many scalar arguments as
// registers, and has no struct for several N in its base header; here the shape is a template parameter and the accumulator an array.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

// How an operand's elements follow each other in shared memory: along its K dimension, or along its M or N dimension.
enum class Major : int { kK = 0, kMn = 1 };

// A descriptor made by the generator (everything but the address) aimed at `pointer`, which the layout's atom aligns.
CUTLASS_FA_DEVICE uint64_t matrix_descriptor(uint64_t layout, void const* pointer) {
  return layout | ((shared_address(pointer) & 0x3FFFF) >> 4);
}

// The descriptor of the same layout `bytes` further on (a multiple of 16).
CUTLASS_FA_DEVICE uint64_t advance_descriptor(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes >> 4); }

// Orders earlier register writes before the wgmmas that follow.
CUTLASS_FA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of issued wgmmas.
CUTLASS_FA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the latest groups are still running.
template <int kPending>
CUTLASS_FA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to these registers across this point: an operation in flight owns them.
template <int kSize>
CUTLASS_FA_DEVICE void pin_registers(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+f"(registers[i])::"memory");
  }
}
template <int kSize>
CUTLASS_FA_DEVICE void pin_registers(uint32_t (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+r"(registers[i])::"memory");
  }
}

// p <- next_p here and not later: a move between the issue of two products would make the compiler serialise them.
template <int kSize>
CUTLASS_FA_DEVICE void take_operand(uint32_t (&p)[kSize], uint32_t const (&next_p)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    p[i] = next_p[i];
  }
  pin_registers(p);
}

// One struct per N, filled in by the macro below.
template <int kN>
struct WgmmaShape;

// Issue D (+)= A B for one k-step of 16. `accumulate` false overwrites D.
template <class Element, Major kMajorB, int kSize>
CUTLASS_FA_DEVICE void wgmma_ss(float (&d)[kSize], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
  WgmmaShape<2 * kSize>::template ss<Element, kMajorB>(d, descriptor_a, descriptor_b, accumulate);
}

// As wgmma_ss; a: four registers of A, each a pair of neighbouring k (PTX ISA, "Register fragments for wgmma").
template <class Element, Major kMajorB, int kSize>
CUTLASS_FA_DEVICE void wgmma_rs(float (&d)[kSize], uint32_t const* a, uint64_t descriptor_b, bool accumulate) {
  WgmmaShape<2 * kSize>::template rs<Element, kMajorB>(d, a, descriptor_b, accumulate);
}

CUTLASS_FA_DEVICE void advance_four(uint64_t (&descriptors)[4], uint64_t descriptor, int const* bytes) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    descriptors[i] = advance_descriptor(descriptor, bytes[i]);
  }
}

// All k-steps of a product. Step s reads A bytes_a[s] behind descriptor_a and B bytes_b[s] behind descriptor_b; `accumulate` false
// overwrites D in the first. Four steps are one statement to the compiler, which else carries every accumulator from statement to
// statement (measured: the same cubin, 7% sooner at head_dim 128). Descriptors are advanced four at a time, not all beforehand, or at
// head_dim 256 they wait in registers that every instruction then has to move to uniform ones.
template <class Element, Major kMajorB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_ss_steps(float (&d)[kSize], uint64_t descriptor_a, int const (&bytes_a)[kSteps], uint64_t descriptor_b,
                                      int const (&bytes_b)[kSteps], bool accumulate) {
#pragma unroll
  for (int step = 0; step < kSteps / 4 * 4; step += 4) {
    uint64_t a[4], b[4];
    advance_four(a, descriptor_a, bytes_a + step);
    advance_four(b, descriptor_b, bytes_b + step);
    WgmmaShape<2 * kSize>::template ss4<Element, kMajorB>(d, a, b, accumulate || step > 0);
  }
#pragma unroll
  for (int step = kSteps / 4 * 4; step < kSteps; ++step) {
    wgmma_ss<Element, kMajorB>(d, advance_descriptor(descriptor_a, bytes_a[step]), advance_descriptor(descriptor_b, bytes_b[step]),
                               accumulate || step > 0);
  }
}

// As wgmma_ss_steps; a: four registers for each step.
template <class Element, Major kMajorB, int kSize, int kSteps>
CUTLASS_FA_DEVICE void wgmma_rs_steps(float (&d)[kSize], uint32_t const (&a)[4 * kSteps], uint64_t descriptor_b,
                                      int const (&bytes_b)[kSteps], bool accumulate) {
#pragma unroll
  for (int step = 0; step < kSteps / 4 * 4; step += 4) {
    uint64_t b[4];
    advance_four(b, descriptor_b, bytes_b + step);
    WgmmaShape<2 * kSize>::template rs4<Element, kMajorB>(d, a + 4 * step, b, accumulate || step > 0);
  }
#pragma unroll
  for (int step = kSteps / 4 * 4; step < kSteps; ++step) {
    wgmma_rs<Element, kMajorB>(d, a + 4 * step, advance_descriptor(descriptor_b, bytes_b[step]), accumulate || step > 0);
  }
}

// Accumulator registers in groups of eight: the operand list %8g .. %8g+7, and the C++ operands behind it.
#define CUTLASS_FA_LIST_0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define CUTLASS_FA_LIST_1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define CUTLASS_FA_LIST_2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define CUTLASS_FA_LIST_3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define CUTLASS_FA_LIST_4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define CUTLASS_FA_LIST_5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define CUTLASS_FA_LIST_6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define CUTLASS_FA_LIST_7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define CUTLASS_FA_LIST_8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define CUTLASS_FA_LIST_9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define CUTLASS_FA_LIST_10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define CUTLASS_FA_LIST_11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define CUTLASS_FA_LIST_12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define CUTLASS_FA_LIST_13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define CUTLASS_FA_LIST_14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define CUTLASS_FA_LIST_15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define CUTLASS_FA_LISTS_1 CUTLASS_FA_LIST_0
#define CUTLASS_FA_LISTS_2 CUTLASS_FA_LISTS_1 CUTLASS_FA_LIST_1
#define CUTLASS_FA_LISTS_3 CUTLASS_FA_LISTS_2 CUTLASS_FA_LIST_2
#define CUTLASS_FA_LISTS_4 CUTLASS_FA_LISTS_3 CUTLASS_FA_LIST_3
#define CUTLASS_FA_LISTS_5 CUTLASS_FA_LISTS_4 CUTLASS_FA_LIST_4
#define CUTLASS_FA_LISTS_6 CUTLASS_FA_LISTS_5 CUTLASS_FA_LIST_5
#define CUTLASS_FA_LISTS_7 CUTLASS_FA_LISTS_6 CUTLASS_FA_LIST_6
#define CUTLASS_FA_LISTS_8 CUTLASS_FA_LISTS_7 CUTLASS_FA_LIST_7
#define CUTLASS_FA_LISTS_9 CUTLASS_FA_LISTS_8 CUTLASS_FA_LIST_8
#define CUTLASS_FA_LISTS_10 CUTLASS_FA_LISTS_9 CUTLASS_FA_LIST_9
#define CUTLASS_FA_LISTS_11 CUTLASS_FA_LISTS_10 CUTLASS_FA_LIST_10
#define CUTLASS_FA_LISTS_12 CUTLASS_FA_LISTS_11 CUTLASS_FA_LIST_11
#define CUTLASS_FA_LISTS_13 CUTLASS_FA_LISTS_12 CUTLASS_FA_LIST_12
#define CUTLASS_FA_LISTS_14 CUTLASS_FA_LISTS_13 CUTLASS_FA_LIST_13
#define CUTLASS_FA_LISTS_15 CUTLASS_FA_LISTS_14 CUTLASS_FA_LIST_14
#define CUTLASS_FA_LISTS_16 CUTLASS_FA_LISTS_15 CUTLASS_FA_LIST_15
#define CUTLASS_FA_EIGHT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CUTLASS_FA_EIGHTS_1 CUTLASS_FA_EIGHT(0)
#define CUTLASS_FA_EIGHTS_2 CUTLASS_FA_EIGHTS_1, CUTLASS_FA_EIGHT(8)
#define CUTLASS_FA_EIGHTS_3 CUTLASS_FA_EIGHTS_2, CUTLASS_FA_EIGHT(16)
#define CUTLASS_FA_EIGHTS_4 CUTLASS_FA_EIGHTS_3, CUTLASS_FA_EIGHT(24)
#define CUTLASS_FA_EIGHTS_5 CUTLASS_FA_EIGHTS_4, CUTLASS_FA_EIGHT(32)
#define CUTLASS_FA_EIGHTS_6 CUTLASS_FA_EIGHTS_5, CUTLASS_FA_EIGHT(40)
#define CUTLASS_FA_EIGHTS_7 CUTLASS_FA_EIGHTS_6, CUTLASS_FA_EIGHT(48)
#define CUTLASS_FA_EIGHTS_8 CUTLASS_FA_EIGHTS_7, CUTLASS_FA_EIGHT(56)
#define CUTLASS_FA_EIGHTS_9 CUTLASS_FA_EIGHTS_8, CUTLASS_FA_EIGHT(64)
#define CUTLASS_FA_EIGHTS_10 CUTLASS_FA_EIGHTS_9, CUTLASS_FA_EIGHT(72)
#define CUTLASS_FA_EIGHTS_11 CUTLASS_FA_EIGHTS_10, CUTLASS_FA_EIGHT(80)
#define CUTLASS_FA_EIGHTS_12 CUTLASS_FA_EIGHTS_11, CUTLASS_FA_EIGHT(88)
#define CUTLASS_FA_EIGHTS_13 CUTLASS_FA_EIGHTS_12, CUTLASS_FA_EIGHT(96)
#define CUTLASS_FA_EIGHTS_14 CUTLASS_FA_EIGHTS_13, CUTLASS_FA_EIGHT(104)
#define CUTLASS_FA_EIGHTS_15 CUTLASS_FA_EIGHTS_14, CUTLASS_FA_EIGHT(112)
#define CUTLASS_FA_EIGHTS_16 CUTLASS_FA_EIGHTS_15, CUTLASS_FA_EIGHT(120)

// clang-format off
// One instruction; SCALE: whether it accumulates, a predicate of PTX.
#define CUTLASS_FA_WGMMA_SS_STEP(N, GROUPS, TYPES, A, B, SCALE, T)                                                                   \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" CUTLASS_FA_LISTS_##GROUPS "}, %" #A ", %" #B ", " SCALE ", 1, 1, 0, %" #T ";"
#define CUTLASS_FA_WGMMA_RS_STEP(N, GROUPS, TYPES, A0, A1, A2, A3, B, SCALE, T)                                                      \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES                                                                            \
  " {" CUTLASS_FA_LISTS_##GROUPS "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", " SCALE ", 1, 1, %" #T ";"
#define CUTLASS_FA_WGMMA_SS(N, GROUPS, TYPES, A, B, P, T)                                                                            \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;" CUTLASS_FA_WGMMA_SS_STEP(N, GROUPS, TYPES, A, B, "p", T) "}"              \
               : CUTLASS_FA_EIGHTS_##GROUPS                                                                                          \
               : "l"(descriptor_a), "l"(descriptor_b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)))
#define CUTLASS_FA_WGMMA_RS(N, GROUPS, TYPES, A0, A1, A2, A3, B, P, T)                                                               \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;" CUTLASS_FA_WGMMA_RS_STEP(N, GROUPS, TYPES, A0, A1, A2, A3, B, "p", T) "}" \
               : CUTLASS_FA_EIGHTS_##GROUPS                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)))
// Four steps, of which all but the first accumulate in any case.
#define CUTLASS_FA_WGMMA_SS4(N, GROUPS, TYPES, A0, A1, A2, A3, B0, B1, B2, B3, P, T)                                                 \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;" CUTLASS_FA_WGMMA_SS_STEP(N, GROUPS, TYPES, A0, B0, "p", T)                \
               CUTLASS_FA_WGMMA_SS_STEP(N, GROUPS, TYPES, A1, B1, "1", T) CUTLASS_FA_WGMMA_SS_STEP(N, GROUPS, TYPES, A2, B2, "1", T) \
               CUTLASS_FA_WGMMA_SS_STEP(N, GROUPS, TYPES, A3, B3, "1", T) "}"                                                        \
               : CUTLASS_FA_EIGHTS_##GROUPS                                                                                          \
               : "l"(descriptors_a[0]), "l"(descriptors_a[1]), "l"(descriptors_a[2]), "l"(descriptors_a[3]),                         \
                 "l"(descriptors_b[0]), "l"(descriptors_b[1]), "l"(descriptors_b[2]), "l"(descriptors_b[3]),                         \
                 "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)))
#define CUTLASS_FA_WGMMA_RS4(N, GROUPS, TYPES, A0, A1, A2, A3, A4, A5, A6, A7, A8, A9, A10, A11, A12, A13, A14, A15, B0, B1, B2, B3, P, T)\
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;" CUTLASS_FA_WGMMA_RS_STEP(N, GROUPS, TYPES, A0, A1, A2, A3, B0, "p", T)    \
               CUTLASS_FA_WGMMA_RS_STEP(N, GROUPS, TYPES, A4, A5, A6, A7, B1, "1", T)                                                \
               CUTLASS_FA_WGMMA_RS_STEP(N, GROUPS, TYPES, A8, A9, A10, A11, B2, "1", T)                                              \
               CUTLASS_FA_WGMMA_RS_STEP(N, GROUPS, TYPES, A12, A13, A14, A15, B3, "1", T) "}"                                        \
               : CUTLASS_FA_EIGHTS_##GROUPS                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),                             \
                 "r"(a[8]), "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]), "r"(a[15]),                       \
                 "l"(descriptors_b[0]), "l"(descriptors_b[1]), "l"(descriptors_b[2]), "l"(descriptors_b[3]),                         \
                 "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorB)))

// I0 .. I21: the numbers of the operands after the accumulator's N / 2 registers.
#define CUTLASS_FA_WGMMA_SHAPE(N, GROUPS, I0, I1, I2, I3, I4, I5, I6, I7, I8, I9, I10, I11, I12, I13, I14, I15, I16, I17, I18, I19, I20, I21)\
  template <>                                                                                                                        \
  struct WgmmaShape<N> {                                                                                                             \
    template <class Element, Major kMajorB>                                                                                          \
    CUTLASS_FA_DEVICE static void ss(float (&d)[N / 2], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {             \
      if constexpr (is_same<Element, bfloat16>) {                                                                                    \
        CUTLASS_FA_WGMMA_SS(N, GROUPS, "bf16.bf16", I0, I1, I2, I3);                                                                 \
      } else {                                                                                                                       \
        CUTLASS_FA_WGMMA_SS(N, GROUPS, "f16.f16", I0, I1, I2, I3);                                                                   \
      }                                                                                                                              \
    }                                                                                                                                \
    template <class Element, Major kMajorB>                                                                                          \
    CUTLASS_FA_DEVICE static void rs(float (&d)[N / 2], uint32_t const* a, uint64_t descriptor_b, bool accumulate) {                 \
      if constexpr (is_same<Element, bfloat16>) {                                                                                    \
        CUTLASS_FA_WGMMA_RS(N, GROUPS, "bf16.bf16", I0, I1, I2, I3, I4, I5, I6);                                                     \
      } else {                                                                                                                       \
        CUTLASS_FA_WGMMA_RS(N, GROUPS, "f16.f16", I0, I1, I2, I3, I4, I5, I6);                                                       \
      }                                                                                                                              \
    }                                                                                                                                \
    template <class Element, Major kMajorB>                                                                                          \
    CUTLASS_FA_DEVICE static void ss4(float (&d)[N / 2], uint64_t const* descriptors_a, uint64_t const* descriptors_b, bool accumulate) {\
      if constexpr (is_same<Element, bfloat16>) {                                                                                    \
        CUTLASS_FA_WGMMA_SS4(N, GROUPS, "bf16.bf16", I0, I1, I2, I3, I4, I5, I6, I7, I8, I9);                                        \
      } else {                                                                                                                       \
        CUTLASS_FA_WGMMA_SS4(N, GROUPS, "f16.f16", I0, I1, I2, I3, I4, I5, I6, I7, I8, I9);                                          \
      }                                                                                                                              \
    }                                                                                                                                \
    template <class Element, Major kMajorB>                                                                                          \
    CUTLASS_FA_DEVICE static void rs4(float (&d)[N / 2], uint32_t const* a, uint64_t const* descriptors_b, bool accumulate) {        \
      if constexpr (is_same<Element, bfloat16>) {                                                                                    \
        CUTLASS_FA_WGMMA_RS4(N, GROUPS, "bf16.bf16", I0, I1, I2, I3, I4, I5, I6, I7, I8, I9, I10, I11, I12, I13, I14, I15, I16, I17, I18, I19, I20, I21);\
      } else {                                                                                                                       \
        CUTLASS_FA_WGMMA_RS4(N, GROUPS, "f16.f16", I0, I1, I2, I3, I4, I5, I6, I7, I8, I9, I10, I11, I12, I13, I14, I15, I16, I17, I18, I19, I20, I21);\
      }                                                                                                                              \
    }                                                                                                                                \
  };

CUTLASS_FA_WGMMA_SHAPE(16, 1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29)
CUTLASS_FA_WGMMA_SHAPE(32, 2, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37)
CUTLASS_FA_WGMMA_SHAPE(48, 3, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45)
CUTLASS_FA_WGMMA_SHAPE(64, 4, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53)
CUTLASS_FA_WGMMA_SHAPE(80, 5, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61)
CUTLASS_FA_WGMMA_SHAPE(96, 6, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69)
CUTLASS_FA_WGMMA_SHAPE(112, 7, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77)
CUTLASS_FA_WGMMA_SHAPE(128, 8, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85)
CUTLASS_FA_WGMMA_SHAPE(144, 9, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93)
CUTLASS_FA_WGMMA_SHAPE(160, 10, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101)
CUTLASS_FA_WGMMA_SHAPE(176, 11, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109)
CUTLASS_FA_WGMMA_SHAPE(192, 12, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117)
CUTLASS_FA_WGMMA_SHAPE(208, 13, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125)
CUTLASS_FA_WGMMA_SHAPE(224, 14, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 132, 133)
CUTLASS_FA_WGMMA_SHAPE(240, 15, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141)
CUTLASS_FA_WGMMA_SHAPE(256, 16, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 145, 146, 147, 148, 149)
// clang-format on

}  // namespace cutlass_fa
