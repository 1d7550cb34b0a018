// SPDX-License-Identifier: BSD-3-Clause
// What a matrix descriptor names: 16-byte units of shared memory and the elements in them.
#pragma once

#include <cutlass_fa_executor/door.hpp>

namespace cutlass_fa::executor {

struct WgmmaOp;

// Reads A (where it lies in shared memory) and B of `op` into op.a and op.b, and notes which bytes and which copies they came from.
// Faults on bytes of B that nobody wrote, on bytes that a copy in flight owns, and outside shared memory.
void read_operands(WgmmaOp& op, int warpgroup, std::uint32_t seq);

// Whether the bytes are still what they were: a product in flight may read them until it is waited for.
bool operands_are_unchanged(WgmmaOp const& op);

float element_value(ElementKind kind, std::uint32_t bits);

}  // namespace cutlass_fa::executor
