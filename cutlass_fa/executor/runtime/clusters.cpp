// SPDX-License-Identifier: BSD-3-Clause
// What the CTAs of a cluster do to each other: their common barrier, arrivals at each other's mbarriers, reads of each other's shared
// memory. Multicast copies are in copies.cpp.
//
// PTX ISA, "barrier.cluster", "mapa". CUDA C++ Programming Guide, "Distributed Shared Memory": a CTA's shared memory exists from its start,
// which a barrier shows to the others, to its end, which must come after the last access.
#include <cstring>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

// Threads that have ended are not waited for.
void try_open_barrier() {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) { return; }
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.released.merge(cluster.arriving);
  cluster.arriving.clear();
  for (auto const& each : cluster.cta) {
    for (auto const& thread : each->thread) {
      if (thread->wait.kind == WaitKind::kCluster) { wake(*thread); }
    }
  }
}

// This thread's act on the shared memory of `other`, of which `other` must know before it ends.
void touch(Cta& other, char const* act, Site site) {
  Clock::set(self->clock.remote_acts, self->cluster_index, ++self->remote_acts);
  if (other.touched_by.empty()) { other.touched_by.resize(static_cast<std::size_t>(cluster.size() * other.threads)); }
  other.touched_by[self->cluster_index] = {self->remote_acts, act, site};
}

}  // namespace

int cluster_rank() { return cta->rank; }

int cluster_size() { return cluster.size(); }

void cluster_arrive(Site site) {
  if (self->is_at_cluster_barrier) { fault(site, "a thread arrives at the cluster's barrier twice without a cluster_wait between"); }
  self->is_at_cluster_barrier = true;
  ++cluster.arrived;
  release_into(cluster.arriving);
  try_open_barrier();
  let_others_run(site);
}

void cluster_wait(Site site) {
  if (!self->is_at_cluster_barrier) { fault(site, "cluster_wait without a cluster_arrive before it"); }
  let_others_run(site);
  if (cluster.phase == self->cluster_phase) { block(WaitKind::kCluster, 0, 0, site); }
  self->is_at_cluster_barrier = false;
  ++self->cluster_phase;
  self->clock.merge(cluster.released);
}

// A thread that ends counts as one that arrives, so its own arrival would count twice.
void leave_cluster_barrier() {
  if (self->is_at_cluster_barrier) { fault(self->last, "a thread ends between its cluster_arrive and the cluster_wait"); }
  try_open_barrier();
}

Cta& other_cta(char const* act, int rank, Site site) {
  if (rank < 0 || rank >= cluster.size()) { fault(site, "%s to CTA rank %d: the cluster has %d", act, rank, cluster.size()); }
  Cta& other = *cluster.cta[rank];
  if (self->cluster_phase == 0 && &other != self->cta) {
    fault(site, "%s to CTA rank %d, which may not have started as far as this thread knows: no cluster_sync came before", act, rank);
  }
  if (other.live == 0) { fault(site, "%s to CTA rank %d, which has ended: its shared memory is gone", act, rank); }
  return other;
}

void remote_arrive(std::uint64_t* state, int rank, Site site) {
  constexpr char const* kAct = "remote_arrive";
  let_others_run(site);
  Cta& other = other_cta(kAct, rank, site);
  std::uint32_t const offset = shared_offset("the mbarrier of a remote_arrive", state, sizeof *state, sizeof *state, site);
  if (&other != self->cta) { touch(other, kAct, site); }
  {
    Within const within(other);
    int const id = find_mbarrier(reinterpret_cast<std::uint64_t const*>(cta->shared + offset), site);
    if (&other != self->cta && !cta->mbarrier[id].fenced) {
      fault(site, "%s at an mbarrier without fence_mbarrier_init after its init%s", kAct, place(cta->mbarrier[id].site).c_str());
    }
    arrive_at_mbarrier(id, self->clock, site);
    begin_epoch();
  }
  let_others_run(site);
}

std::uint32_t remote_load(std::uint32_t const* pointer, int rank, Site site) {
  constexpr char const* kAct = "remote_load";
  let_others_run(site);
  Cta& other = other_cta(kAct, rank, site);
  std::uint32_t const offset = shared_offset(kAct, pointer, sizeof *pointer, sizeof *pointer, site);
  if (&other != self->cta) { touch(other, kAct, site); }
  Within const within(other);
  check_landed(self->clock, kAct, offset / kGranule * kGranule, site);
  check_written(kAct, offset / kGranule * kGranule, site);
  std::uint32_t word;
  std::memcpy(&word, cta->shared + offset, sizeof word);
  return word;
}

void check_cluster_at_end() {
  for (std::size_t thread = 0; thread < cta->touched_by.size(); ++thread) {
    RemoteAct const& act = cta->touched_by[thread];
    if (knows(cta->at_end.remote_acts, static_cast<int>(thread), act.seq)) { continue; }
    fault(act.site,
          "CTA rank %d ends, and its shared memory with it, while a %s of thread %zu of CTA rank %zu may be to come: nothing that its "
          "threads waited for came after it",
          cta->rank, act.name, thread % cta->threads, thread / cta->threads);
  }
}

}  // namespace cutlass_fa::executor
