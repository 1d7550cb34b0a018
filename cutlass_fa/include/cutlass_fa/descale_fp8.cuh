// SPDX-License-Identifier: BSD-3-Clause
// Factors of stored 8-bit numbers: a stored number times its factor is the number that is meant.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

// The factor of one head of one sequence; no array: 1.
CUTLASS_FA_DEVICE float factor_of(float const* factors, int batch, int64_t stride_batch, int head, int64_t stride_head) {
  return factors == nullptr ? 1.0f : factors[batch * stride_batch + head * stride_head];
}

// Of one of its blocks; those behind the last have the last one's.
CUTLASS_FA_DEVICE float factor_of(float const* factors, int batch, int64_t stride_batch, int head, int64_t stride_head, int64_t block,
                                  int64_t stride_block, int64_t blocks) {
  return factor_of(factors == nullptr ? factors : factors + min(block, blocks - 1) * stride_block, batch, stride_batch, head, stride_head);
}

template <int kSize>
CUTLASS_FA_DEVICE void multiply(float (&acc)[kSize], float factor) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) { acc[i] *= factor; }
}

}  // namespace cutlass_fa
