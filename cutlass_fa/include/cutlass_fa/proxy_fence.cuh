// SPDX-License-Identifier: BSD-3-Clause
// Plain writes to shared memory, made visible to what reads it asynchronously (WGMMA operands, TMA stores).
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Every thread that wrote calls this after its writes, and a barrier separates it from the thread that issues the reader.
CUTLASS_FA_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace cutlass_fa
