// SPDX-License-Identifier: BSD-3-Clause
// cp.async: 16 bytes from global to shared memory by one thread, asynchronously, past the L1 cache and the registers.
//
// A thread waits for its own copies only; a barrier after the wait shows them to the others. The bytes arrive as plain stores do: matrix
// products of wgmma and TMA stores need fence_async_proxy after the wait. The destination belongs to the copy until then.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

// Both addresses are multiples of 16.
CUTLASS_FA_DEVICE void cp_async(void* destination, void const* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(destination)), "l"(source) : "memory");
}

// Reads only `source_bytes` (0 to 16) and fills the rest of the 16 with zeros: 0 for a row that does not exist, whose address is not read.
CUTLASS_FA_DEVICE void cp_async(void* destination, void const* source, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source), "r"(source_bytes)
               : "memory");
}

// Closes a group of this thread's copies, perhaps an empty one.
CUTLASS_FA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's latest groups are still under way.
template <int kPending>
CUTLASS_FA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Until all of this thread's copies have landed, committed or not.
CUTLASS_FA_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace cutlass_fa
