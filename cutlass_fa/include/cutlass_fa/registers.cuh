// SPDX-License-Identifier: BSD-3-Clause
// Moving registers between warpgroups (setmaxnreg): the producer gives up what the consumers take.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// All four warps of a warpgroup call these; counts are per thread and multiples of 8.
template <int kRegisters>
CUTLASS_FA_DEVICE void shrink_registers_to() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

template <int kRegisters>
CUTLASS_FA_DEVICE void grow_registers_to() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

}  // namespace cutlass_fa
