// SPDX-License-Identifier: BSD-3-Clause
// Hardware barriers of a CTA (__syncthreads and the named ones) and mbarriers.
#include <cstring>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

constexpr int kBlockBarrier = kNamedBarriers;
constexpr std::uint64_t kMbarrierWord = 0xB0A7B0A7B0A7B0A7ull;  // what an initialised mbarrier's memory holds

// Counts this thread; true when that opened the barrier.
bool join(int id, int expected, Site site) {
  NamedBarrier& barrier = cta->barrier[id];
  if (barrier.count == 0) {
    barrier.expected = expected;
    barrier.site = site;
  }
  if (barrier.expected != expected) {
    fault(site, "barrier %d is used with %d threads while %d are expected%s", id, expected, barrier.expected, place(barrier.site).c_str());
  }
  if (barrier.present[self->index]) { fault(site, "a thread comes to barrier %d twice before it has opened once", id); }
  barrier.present[self->index] = true;
  release_into(barrier.clock);
  if (++barrier.count < barrier.expected) { return false; }
  for (auto& thread : cta->thread) {
    bool const is_sync = thread->wait.kind == WaitKind::kNamedBarrier || thread->wait.kind == WaitKind::kBlockSync;
    if (is_sync && thread->wait.id == id) {
      thread->clock.merge(barrier.clock);
      wake(*thread);
    }
  }
  return true;
}

void reset(int id) {
  NamedBarrier& barrier = cta->barrier[id];
  barrier.count = 0;
  barrier.present.reset();
  barrier.clock.clear();
}

void sync(WaitKind kind, int id, int expected, Site site) {
  if (join(id, expected, site)) {
    self->clock.merge(cta->barrier[id].clock);
    reset(id);
    let_others_run(site);
  } else {
    block(kind, id, 0, site);
  }
}

void check_named(int id, int threads, Site site) {
  if (id < 0 || id >= kNamedBarriers) { fault(site, "named barrier %d: ids are 0 to %d", id, kNamedBarriers - 1); }
  if (threads <= 0 || threads % kWarp != 0 || threads > cta->threads) {
    fault(site, "named barrier %d with %d threads: not a positive multiple of 32 up to the CTA's %d", id, threads, cta->threads);
  }
}

std::uint32_t offset_of(std::uint64_t const* state, Site site) {
  auto const* const at = reinterpret_cast<char const*>(state);
  if (at < cta->shared || at + sizeof *state > cta->shared + cta->shared_bytes) { fault(site, "an mbarrier outside shared memory"); }
  if ((at - cta->shared) % 8 != 0) { fault(site, "an mbarrier that is not aligned to 8 bytes"); }
  return static_cast<std::uint32_t>(at - cta->shared);
}

bool has_ended(MbarrierState const& barrier, std::uint32_t parity) { return (barrier.phase & 1) != parity; }

// Ends the phase if nothing is missing.
void try_end_phase(int id, Site site) {
  MbarrierState& barrier = cta->mbarrier[id];
  if (barrier.pending != 0 || barrier.bytes != 0) { return; }
  for (int const index : cta->pending_copies) {
    Copy const& copy = cta->copies[index];
    if (copy.barrier == id && copy.phase == barrier.phase) {
      fault(site, "the phase of the mbarrier at %s ends while the copy to %s%s is in flight: too few bytes were expected",
            region(barrier.offset, 8).c_str(), region(copy.offset, copy.bytes).c_str(), place(copy.site).c_str());
    }
  }
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  barrier.released.merge(barrier.arriving);
  barrier.arriving.clear();
  for (auto& thread : cta->thread) {
    Wait const& wait = thread->wait;
    if (wait.kind == WaitKind::kMbarrier && wait.id == id && has_ended(barrier, wait.detail)) { wake(*thread); }
  }
}

}  // namespace

void arrive_at_mbarrier(int id, Clock const& clock, Site site) {
  MbarrierState& barrier = cta->mbarrier[id];
  if (barrier.pending == 0) {
    fault(site, "an arrival too many on the mbarrier at %s: all %u of this phase are in and %lld bytes have yet to land",
          region(barrier.offset, 8).c_str(), barrier.arrivals, static_cast<long long>(barrier.bytes));
  }
  --barrier.pending;
  barrier.arriving.merge(clock);
  try_end_phase(id, site);
}

void block_sync(Site site) { sync(WaitKind::kBlockSync, kBlockBarrier, cta->threads, site); }

void named_barrier_sync(int id, int threads, Site site) {
  check_named(id, threads, site);
  sync(WaitKind::kNamedBarrier, id, threads, site);
}

void named_barrier_arrive(int id, int threads, Site site) {
  check_named(id, threads, site);
  if (join(id, threads, site)) { reset(id); }
  let_others_run(site);
}

// The index of an initialised mbarrier that this thread may use: the initialisation must be known to it through some barrier.
int find_mbarrier(std::uint64_t const* state, Site site) {
  std::uint32_t const offset = offset_of(state, site);
  for (std::size_t i = 0; i < cta->mbarrier.size(); ++i) {
    if (cta->mbarrier[i].offset != offset) { continue; }
    if (*state != kMbarrierWord) { fault(site, "the mbarrier at %s was overwritten", region(offset, 8).c_str()); }
    if (self->clock.at[cta->mbarrier_entry(static_cast<int>(i))] == 0) {
      fault(site, "the mbarrier at %s is used by a thread that no barrier separates from its initialisation%s", region(offset, 8).c_str(),
            place(cta->mbarrier[i].site).c_str());
    }
    return static_cast<int>(i);
  }
  fault(site, "the mbarrier at %s is not initialised", region(offset, 8).c_str());
}

void mbarrier_init(std::uint64_t* state, std::uint32_t arrivals, Site site) {
  std::uint32_t const offset = offset_of(state, site);
  if (arrivals == 0 || arrivals >= 1u << 20) { fault(site, "an mbarrier of %u arrivals", arrivals); }
  for (MbarrierState const& other : cta->mbarrier) {
    if (other.offset == offset) {
      fault(site, "the mbarrier at %s is initialised twice, first%s", region(offset, 8).c_str(), place(other.site).c_str());
    }
  }
  if (cta->mbarrier.size() == kMaxMbarriers) { fault(site, "more than %d mbarriers: raise kMaxMbarriers", kMaxMbarriers); }
  *state = kMbarrierWord;
  MbarrierState barrier;
  barrier.offset = offset;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.initialiser = self->index;
  barrier.site = site;
  self->clock.at[cta->mbarrier_entry(static_cast<int>(cta->mbarrier.size()))] = 1;
  cta->mbarrier.push_back(barrier);
}

void mbarrier_fence_init(Site) {
  for (MbarrierState& barrier : cta->mbarrier) {
    if (barrier.initialiser == self->index) { barrier.fenced = true; }
  }
}

void mbarrier_arrive(std::uint64_t* state, Site site) {
  arrive_at_mbarrier(find_mbarrier(state, site), self->clock, site);
  begin_epoch();
  let_others_run(site);
}

void mbarrier_arrive_and_expect(std::uint64_t* state, std::uint32_t bytes, Site site) {
  int const id = find_mbarrier(state, site);
  cta->mbarrier[id].bytes += bytes;
  arrive_at_mbarrier(id, self->clock, site);
  begin_epoch();
  let_others_run(site);
}

void mbarrier_wait(std::uint64_t* state, std::uint32_t parity, Site site) {
  int const id = find_mbarrier(state, site);
  if (parity > 1) { fault(site, "an mbarrier wait for parity %u", parity); }
  let_others_run(site);
  if (!has_ended(cta->mbarrier[id], parity)) {
    block(WaitKind::kMbarrier, id, parity, site);
    // The hardware polls: a phase that has come and gone before the next look is missed for ever.
    if (!has_ended(cta->mbarrier[id], parity)) {
      fault(site, "the mbarrier at %s ended two phases before a thread that waited for the first one looked again",
            region(cta->mbarrier[id].offset, 8).c_str());
    }
  }
  MbarrierState const& barrier = cta->mbarrier[id];
  self->clock.merge(barrier.released);
  self->clock.at[cta->mbarrier_entry(id)] = 1 + barrier.phase;
}

void complete_bytes(int id, std::uint32_t bytes, Site site) {
  MbarrierState& barrier = cta->mbarrier[id];
  barrier.bytes -= bytes;
  if (barrier.pending == 0 && barrier.bytes < 0) {
    fault(site, "%lld bytes more land than the mbarrier at %s was told to expect", static_cast<long long>(-barrier.bytes),
          region(barrier.offset, 8).c_str());
  }
  try_end_phase(id, site);
}

}  // namespace cutlass_fa::executor
