// SPDX-License-Identifier: BSD-3-Clause
// Hardware barriers of a CTA, numbered 0 to 14 here; the hardware's barrier 0 is __syncthreads'. A barrier opens when `threads` threads
// have synced or arrived.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id + 1), "r"(threads) : "memory"); }

// Counts this thread without waiting.
CUTLASS_FA_DEVICE void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id + 1), "r"(threads) : "memory"); }

}  // namespace cutlass_fa
