// SPDX-License-Identifier: BSD-3-Clause
// Host twin of cp_async.cuh. The destination holds poison from the issue until the copy lands, at the latest in its thread's wait.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void cp_async(void* destination, void const* source, CUTLASS_FA_SITE) {
  executor::cp_async(destination, source, 16, site);
}

CUTLASS_FA_DEVICE void cp_async(void* destination, void const* source, int source_bytes, CUTLASS_FA_SITE) {
  executor::cp_async(destination, source, source_bytes, site);
}

CUTLASS_FA_DEVICE void cp_async_commit(CUTLASS_FA_SITE) { executor::cp_async_commit(site); }

template <int kPending>
CUTLASS_FA_DEVICE void cp_async_wait(CUTLASS_FA_SITE) {
  executor::cp_async_wait(kPending, site);
}

CUTLASS_FA_DEVICE void cp_async_wait_all(CUTLASS_FA_SITE) {
  executor::cp_async_commit(site);
  executor::cp_async_wait(0, site);
}

}  // namespace cutlass_fa
