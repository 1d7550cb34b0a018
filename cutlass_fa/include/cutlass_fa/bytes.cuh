// SPDX-License-Identifier: BSD-3-Clause
// Words taken apart into bytes and put together in another order.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Bytes 0 and 2 of `low`, then of `high`, from the lowest byte up.
CUTLASS_FA_DEVICE uint32_t even_bytes(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x6420); }

// Bytes 1 and 3 of `low`, then of `high`.
CUTLASS_FA_DEVICE uint32_t odd_bytes(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7531); }

}  // namespace cutlass_fa
