// SPDX-License-Identifier: BSD-3-Clause
// Hardware barriers of a CTA, numbered from 0 for this project's use (CUTLASS keeps the first few hardware ids, __syncthreads' among
// them, for itself). A barrier opens when `threads` threads have synced or arrived.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void named_barrier_sync(int id, int threads) {
  cutlass::arch::NamedBarrier::sync(static_cast<uint32_t>(threads), static_cast<uint32_t>(id));
}

// Counts this thread without waiting.
CUTLASS_FA_DEVICE void named_barrier_arrive(int id, int threads) {
  cutlass::arch::NamedBarrier::arrive(static_cast<uint32_t>(threads), static_cast<uint32_t>(id));
}

}  // namespace cutlass_fa
