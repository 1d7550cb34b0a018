// SPDX-License-Identifier: BSD-3-Clause
// Host twin of base.cuh: CUDA's words for g++, then the device header's own text. Only block_sync differs, to know who calls it.
#pragma once

#include <cutlass_fa_executor/cuda_words.hpp>
#include <cutlass_fa_executor/door.hpp>

void __syncthreads();  // declared for the text below, which is replaced; nothing defines it

#define block_sync device_block_sync
#include_next <cutlass_fa/base.cuh>
#undef block_sync

namespace cutlass_fa {

CUTLASS_FA_DEVICE void block_sync(CUTLASS_FA_SITE) { executor::block_sync(site); }

}  // namespace cutlass_fa
