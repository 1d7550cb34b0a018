// SPDX-License-Identifier: BSD-3-Clause
// mbarrier: a counter in shared memory that threads arrive at, that asynchronous copies report their bytes to, and that threads wait for.
//
// Written on PTX rather than on cutlass/arch/barrier.h: that header brings 1.2 s of standard-library templates into a unit that compiles
// in 0.7 s without it (NVRTC 13.0, 2-core machine).
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/pipeline.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

// A phase ends when `arrivals` threads have arrived and every expected byte has landed. Phases alternate between parity 0 and 1.
struct Mbarrier {
  uint64_t state;

  CUTLASS_FA_DEVICE void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
  }

  CUTLASS_FA_DEVICE void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory"); }

  // Arrive, and hold the phase open until `bytes` more have been written by asynchronous copies.
  CUTLASS_FA_DEVICE void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes) : "memory");
  }

  // Until the phase of this parity has ended. A fresh barrier counts as having ended parity 1.
  CUTLASS_FA_DEVICE void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra FINISHED;\n"
        "bra AGAIN;\n"
        "FINISHED:\n"
        "}" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

// Makes initialised barriers visible to the copy engine; the initialising thread calls it before the CTA's first barrier.
CUTLASS_FA_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

}  // namespace cutlass_fa
