// SPDX-License-Identifier: BSD-3-Clause
// The CTA's dynamic shared memory, seen as the kernel's SharedStorage.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// Dynamic shared memory starts at a multiple of 1024 bytes when a kernel has no static shared memory, which 128-byte swizzles need.
template <class Storage>
CUTLASS_FA_DEVICE Storage& dynamic_shared_memory() {
  extern __shared__ __align__(1024) char raw[];
  return *reinterpret_cast<Storage*>(raw);
}

// Address in the shared window, as matrix descriptors and PTX operands want it.
CUTLASS_FA_DEVICE uint32_t shared_address(void const* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// A place in shared memory in the one register that instructions address it by. The compiler sees no more than that, so that it neither
// keeps sums of it in further registers nor computes what an instruction adds by itself: a constant that is added to it.
struct SharedPointer {
  uint32_t address;
};

CUTLASS_FA_DEVICE SharedPointer shared_pointer(void const* pointer) {
  SharedPointer result = {shared_address(pointer)};
  asm volatile("" : "+r"(result.address));
  return result;
}

CUTLASS_FA_DEVICE SharedPointer operator+(SharedPointer pointer, int bytes) { return {pointer.address + bytes}; }

}  // namespace cutlass_fa
