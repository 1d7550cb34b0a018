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

struct SharedPointer {
  char const* address;
};

CUTLASS_FA_DEVICE SharedPointer shared_pointer(void const* pointer) { return {static_cast<char const*>(pointer)}; }

CUTLASS_FA_DEVICE SharedPointer operator+(SharedPointer pointer, int bytes) { return {pointer.address + bytes}; }

}  // namespace cutlass_fa
