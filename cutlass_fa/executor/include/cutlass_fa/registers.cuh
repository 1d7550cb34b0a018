// SPDX-License-Identifier: BSD-3-Clause
// Host twin of registers.cuh.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

template <int kRegisters>
CUTLASS_FA_DEVICE void shrink_registers_to(CUTLASS_FA_SITE) {
  executor::shrink_registers(kRegisters, site);
}

template <int kRegisters>
CUTLASS_FA_DEVICE void grow_registers_to(CUTLASS_FA_SITE) {
  executor::grow_registers(kRegisters, site);
}

}  // namespace cutlass_fa
