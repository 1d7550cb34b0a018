// SPDX-License-Identifier: BSD-3-Clause
// Host twin of bytes.cuh: the intrinsic, then the device header's own text over it.
#pragma once

#include <cutlass_fa/base.cuh>

// Byte i of the result is the one of {low, high} that nibble i of `selector` counts (CUDA C++ Programming Guide; no sign replication here).
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  unsigned long long const bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) { result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i; }
  return result;
}

#include_next <cutlass_fa/bytes.cuh>
