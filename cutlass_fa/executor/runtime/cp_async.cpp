// SPDX-License-Identifier: BSD-3-Clause
// cp.async: 16 bytes at a time, landing some time between their issue and their thread's wait.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

void check_source(std::uint64_t source, int bytes, Site site) {
  if (source % kGranule != 0) { fault(site, "cp_async from an address that is not a multiple of %d", kGranule); }
  if (bytes < 0 || bytes > kGranule) { fault(site, "cp_async of %d bytes: 0 to %d", bytes, kGranule); }
  std::string nearest;
  if (bytes != 0 && !is_global(source, bytes, nearest)) {
    fault(site, "cp_async reads address %#llx, outside every buffer (%s)", static_cast<unsigned long long>(source), nearest.c_str());
  }
}

}  // namespace

void cp_async(void* destination, void const* source, int source_bytes, Site site) {
  let_others_run(site);
  auto const address = reinterpret_cast<std::uint64_t>(source);
  check_source(address, source_bytes, site);
  std::uint32_t const offset = shared_offset("cp_async", destination, kGranule, kGranule, site);
  check_overwrite(self->clock, "cp_async", offset, kGranule, site);
  Access& access = access_to(offset / kGranule);
  access.copier = self->cluster_index;
  access.copy = ++self->copies.issued;
  access.site = site;
  mark_unpublished(offset / kGranule);
  std::memset(cta->shared + offset, kPoison, kGranule);
  self->copies.acts.push_back({site, offset, address, source_bytes, false});
  cta->due.push({landing_step(), self->index, self->copies.issued, false});
}

void land_async_copy(Thread& thread, std::uint32_t seq) {
  AsyncCopy* const copy = thread.copies.find(seq);
  if (copy == nullptr || copy->landed) { return; }  // its thread has waited for it
  unsigned char unit[kGranule] = {};
  unsigned char poison[kGranule];
  std::memset(poison, kPoison, kGranule);
  if (std::memcmp(cta->shared + copy->offset, poison, kGranule) != 0) {
    fault(copy->site, "%s was written while a cp_async to it was in flight", region(copy->offset, kGranule).c_str());
  }
  std::memcpy(unit, reinterpret_cast<void const*>(copy->source), static_cast<std::size_t>(copy->bytes));
  std::memcpy(cta->shared + copy->offset, unit, kGranule);
  copy->landed = true;
}

void cp_async_commit(Site site) {
  self->copies.groups.push_back(self->copies.issued);
  let_others_run(site);
}

void cp_async_wait(int pending, Site site) {
  let_others_run(site);
  AsyncQueue<AsyncCopy>& copies = self->copies;
  std::uint32_t const over = copies.last_over(pending);
  for (std::uint32_t seq = copies.first(); seq <= over; ++seq) {
    land_async_copy(*self, seq);
    copies.acts.pop_front();
  }
  if (over != 0) { Clock::set(self->clock.copies, self->cluster_index, over); }
}

void cp_async_mbarrier_arrive(std::uint64_t* state, Site site) {
  let_others_run(site);
  cta->pending_arrivals.push_back({site, find_mbarrier(state, site), self->index, self->copies.issued, landing_step()});
  self->copies_handed_over = self->copies.issued;
  let_others_run(site);
}

// What the arrival releases is the copies, and nothing else that its thread has done.
void land_async_arrival(AsyncArrival const& arrival) {
  Thread& thread = *cta->thread[arrival.thread];
  for (std::uint32_t seq = thread.copies.first(); seq <= arrival.seq; ++seq) {
    land_async_copy(thread, seq);
    thread.copies.acts.pop_front();
  }
  Clock copies;
  Clock::set(copies.copies, thread.cluster_index, arrival.seq);
  arrive_at_mbarrier(arrival.barrier, copies, arrival.site);
}

void check_async_at_end() {
  if (self->copies.first() <= self->copies.issued && self->copies_handed_over < self->copies.issued) {
    fault(self->copies.acts.back().site,
          "a thread ends while %zu of its cp_async are in flight (no cp_async_commit and cp_async_wait after them, nor an arrival)",
          std::min<std::size_t>(self->copies.acts.size(), self->copies.issued - self->copies_handed_over));
  }
  if (self->stores_read != self->stores.issued) {
    fault(self->last, "a thread ends while %u of its tma_stores may be reading shared memory (no tma_store_commit and wait after them)",
          self->stores.issued - self->stores_read);
  }
}

}  // namespace cutlass_fa::executor
