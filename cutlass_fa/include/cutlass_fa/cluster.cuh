// SPDX-License-Identifier: BSD-3-Clause
// Clusters (sm_90 and up): CTAs that run at the same time, on neighbouring multiprocessors, and see each other's shared memory. A kernel
// says their number by __cluster_dims__(n, 1, 1).
//
// The shared memory of another CTA exists from that CTA's start to its end: a cluster_sync stands before the first act on it, and
// something that the other waits for (a cluster_sync, or the mbarrier arrived at) after the last.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>

namespace cutlass_fa {

// Which CTA of its cluster this is, from 0.
CUTLASS_FA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// How many CTAs the cluster has.
CUTLASS_FA_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// The barrier of all threads of the cluster that have not ended, in two halves: each thread arrives, then waits for all to have arrived.
// What a thread wrote before it arrived is visible to all after their wait. Not the .aligned form: lanes may come one after another.
CUTLASS_FA_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

CUTLASS_FA_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Both halves. At a kernel's start it stands between fence_mbarrier_init and the first act on another CTA's mbarriers.
CUTLASS_FA_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Arrives at the mbarrier that lies in CTA `rank` of the cluster where `barrier` lies in this one: a consumer tells each producer that
// multicasts to it that its own copy of the buffer is free. `rank` may be the own one. It tells that matrix products and ldmatrix are over;
// plain writes that another CTA shall read want a cluster_sync (an arrival with .release.cluster waits for all memory of the GPU).
CUTLASS_FA_DEVICE void remote_arrive(Mbarrier& barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// The word that lies in CTA `rank` where `pointer` lies in this one's shared memory. The CTA that wrote it syncs with this one in between.
CUTLASS_FA_DEVICE uint32_t remote_load(uint32_t const* pointer, int rank) {
  uint32_t word;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [there];\n"
      "}"
      : "=r"(word)
      : "r"(shared_address(pointer)), "r"(rank)
      : "memory");
  return word;
}

}  // namespace cutlass_fa
