// SPDX-License-Identifier: BSD-3-Clause
// Philox 4x32-10, a counter-based random number generator (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// 2011): 128 random bits as a function of a 128-bit counter and a 64-bit key, with no state. cutlass_fa/dropout.py computes the same.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

struct PhiloxNumbers {
  uint32_t word[4];
};

CUTLASS_FA_DEVICE PhiloxNumbers philox4x32(uint32_t const (&counter)[4], uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t const product0 = uint64_t{0xD2511F53u} * c0;
    uint64_t const product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace cutlass_fa
