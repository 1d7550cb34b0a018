// SPDX-License-Identifier: BSD-3-Clause
// TMA towards global memory: a box of shared memory stored to, or added to, a tensor. Elements outside the tensor are left out.
// A box may reach or lie past the tensor's end, not begin before its start: on an H100 (driver 580.159) a store or reduction at a negative
// coordinate ended in an illegal instruction, where loads allow it.
//
// Plain writes to the source need fence_async_proxy by the threads that wrote, and a barrier between them and the thread that stores. That
// thread commits and waits for its own stores: for the reads, before anyone overwrites the source (and before the CTA ends), or for
// everything, before it tells others that the data are in global memory.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>

namespace cutlass_fa {

// One thread starts the copy of `source` (a multiple of 128 bytes) to the box at (column, row, head, batch).
CUTLASS_FA_DEVICE void tma_store(TensorMap const& map, void const* source, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(source)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// The same for a tensor of five dimensions: (column, head in group, row, group, batch).
CUTLASS_FA_DEVICE void tma_store(TensorMap const& map, void const* source, int column, int head, int row, int group, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(shared_address(source)), "r"(column), "r"(head), "r"(row), "r"(group), "r"(batch)
               : "memory");
}

// Adds a box of float32 to a float32 tensor; each element's addition is atomic, their order is not fixed.
CUTLASS_FA_DEVICE void tma_reduce_add(TensorMap const& map, void const* source, int column, int row, int head, int batch) {
  asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(source)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// Adds `bytes` (a multiple of 16) of float32 to consecutive addresses, with no tensor map; both addresses are multiples of 16.
CUTLASS_FA_DEVICE void bulk_reduce_add(float* destination, void const* source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination), "r"(shared_address(source)),
               "r"(bytes)
               : "memory");
}

// Closes a group of this thread's stores and reductions.
CUTLASS_FA_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's latest groups may still read shared memory: the others' sources may be overwritten.
template <int kPending>
CUTLASS_FA_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all but kPending of this thread's latest groups are in global memory, visible to this thread.
template <int kPending>
CUTLASS_FA_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace cutlass_fa
