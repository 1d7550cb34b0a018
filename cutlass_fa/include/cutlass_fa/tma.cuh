// SPDX-License-Identifier: BSD-3-Clause
// TMA: the copy engine that moves a box of a tensor between global and shared memory, guided by a tensor map encoded on the host.
// On PTX for the reason given in mbarrier.cuh.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

// The driver's CUtensorMap: opaque, 64-byte aligned, passed as a __grid_constant__ kernel parameter.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// What the L2 cache should do with the lines a load brings in: createpolicy's encodings of evict_first and evict_last.
enum class CacheHint : uint64_t {
  kEvictFirst = 0x12F0000000000000ull,
  kEvictLast = 0x14F0000000000000ull,
};

CUTLASS_FA_DEVICE void prefetch_tensor_map(TensorMap const& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// One thread starts the copy of the box at (column, row, head, batch) to `destination`; its bytes are reported to `barrier`.
// Elements outside the tensor arrive as zeros.
CUTLASS_FA_DEVICE void tma_load(TensorMap const& map, Mbarrier& barrier, CacheHint hint, void* destination, int column, int row, int head,
                                int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(
          shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// The same for a tensor of five dimensions: (column, head in group, row, group, batch), or those of packed sequences (tma.py).
CUTLASS_FA_DEVICE void tma_load(TensorMap const& map, Mbarrier& barrier, CacheHint hint, void* destination, int column, int head, int row,
                                int group, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], "
      "%8;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(head), "r"(row), "r"(group), "r"(batch), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

}  // namespace cutlass_fa
