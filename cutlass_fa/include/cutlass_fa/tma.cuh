// SPDX-License-Identifier: BSD-3-Clause
// TMA: the copy engine that moves a box of a tensor between global and shared memory, guided by a tensor map encoded on the host.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>

namespace cutlass_fa {

// The driver's CUtensorMap: opaque, 64-byte aligned, passed as a __grid_constant__ kernel parameter.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// What the L2 cache should do with the lines a load brings in.
enum class CacheHint : uint64_t {
  kEvictFirst = 0x12F0000000000000ull,
  kEvictLast = 0x14F0000000000000ull,
};

CUTLASS_FA_DEVICE void prefetch_tensor_map(TensorMap const& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&map));
}

// One thread starts the copy of the box at (column, row, head, batch) to `destination`; its bytes are reported to `barrier`.
// Elements outside the tensor arrive as zeros.
CUTLASS_FA_DEVICE void tma_load(TensorMap const& map, Mbarrier& barrier, CacheHint hint, void* destination, int column, int row, int head,
                                int batch) {
  cute::SM90_TMA_LOAD_4D::copy(&map, &barrier.state, static_cast<uint64_t>(hint), destination, column, row, head, batch);
}

}  // namespace cutlass_fa
