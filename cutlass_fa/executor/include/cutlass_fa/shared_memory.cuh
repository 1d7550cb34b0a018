// SPDX-License-Identifier: BSD-3-Clause
// Host twin of shared_memory.cuh.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

template <class Storage>
CUTLASS_FA_DEVICE Storage& dynamic_shared_memory(CUTLASS_FA_SITE) {
  return *static_cast<Storage*>(executor::dynamic_shared_memory(sizeof(Storage), site));
}

CUTLASS_FA_DEVICE uint32_t shared_address(void const* pointer) { return executor::shared_address(pointer); }

}  // namespace cutlass_fa
