// SPDX-License-Identifier: BSD-3-Clause
// Plain loads and stores of shared memory. The kernel is compiled with -fsanitize=thread, which calls a function before each load and
// store; that compiler pass is all that is used of ThreadSanitizer, the functions are here.
//
// Two accesses of the same bytes, one of them a store, by threads between which nothing is ordered are a race (Flanagan and Freund,
// FastTrack, PLDI 2009: one epoch for the last store, a vector for the loads after it). Loads and stores also keep to what asynchronous
// acts ask for: landed copies, products that have been waited for.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

std::uintptr_t pc = 0;

PlainAccess& plain_access(std::uint32_t granule) {
  if (cta->plain.empty()) { cta->plain.resize(cta->granule.size()); }
  auto& found = cta->plain[granule];
  if (found == nullptr) { found = std::make_unique<PlainAccess>(); }
  return *found;
}

void check_store_known(Clock const& known, PlainAccess const& plain, int unit, char const* act, std::uint32_t granule, Site site) {
  PlainAccess::Store const& store = plain.store[unit];
  if (store.thread < 0 || knows(known.plain, store.thread, store.epoch)) { return; }
  fault(site, "%s of %s, which no barrier separates from a plain store of thread %d", act,
        region(granule * kGranule + unit * PlainAccess::kUnitBytes, PlainAccess::kUnitBytes).c_str(), store.thread % cta->threads);
}

void check_loads_known(Clock const& known, PlainAccess const& plain, int unit, char const* act, std::uint32_t granule, Site site) {
  std::vector<std::uint32_t> const& load = plain.load[unit];
  for (std::size_t thread = 0; thread < load.size(); ++thread) {
    if (knows(known.plain, static_cast<int>(thread), load[thread])) { continue; }
    fault(site, "%s of %s, which no barrier separates from a plain load of thread %zu", act,
          region(granule * kGranule + unit * PlainAccess::kUnitBytes, PlainAccess::kUnitBytes).c_str(), thread % cta->threads);
  }
}

// Nobody wrote the unit: neither a store nor, as far as its bytes tell, anything else.
bool is_unwritten(PlainAccess const& plain, int unit, std::uint32_t granule) {
  if (plain.store[unit].thread >= 0 || cta->granule[granule].copy != 0) { return false; }
  if (!cta->access.empty() && (cta->access[granule].copy | cta->access[granule].write) != 0) { return false; }
  char const* const bytes = cta->shared + granule * kGranule + unit * PlainAccess::kUnitBytes;
  return std::all_of(bytes, bytes + PlainAccess::kUnitBytes, [](char byte) { return static_cast<unsigned char>(byte) == kPoison; });
}

// The units of one granule that the bytes [from, to) of it touch.
void load(std::uint32_t granule, int from, int to) {
  constexpr char const* kAct = "a plain load";
  check_copied(self->clock, kAct, granule * kGranule, Site{});
  PlainAccess& plain = plain_access(granule);
  for (int unit = from / PlainAccess::kUnitBytes; unit * PlainAccess::kUnitBytes < to; ++unit) {
    check_store_known(self->clock, plain, unit, kAct, granule, Site{});
    if (is_unwritten(plain, unit, granule)) {
      fault(Site{}, "a plain load of %s, which nobody wrote",
            region(granule * kGranule + unit * PlainAccess::kUnitBytes, PlainAccess::kUnitBytes).c_str());
    }
    Clock::set(plain.load[unit], self->cluster_index, self->epoch);
  }
}

void store(std::uint32_t granule, int from, int to) {
  constexpr char const* kAct = "a plain store";
  check_unused(self->clock, kAct, granule, region(granule * kGranule, kGranule), Site{});
  PlainAccess& plain = plain_access(granule);
  for (int unit = from / PlainAccess::kUnitBytes; unit * PlainAccess::kUnitBytes < to; ++unit) {
    check_store_known(self->clock, plain, unit, kAct, granule, Site{});
    check_loads_known(self->clock, plain, unit, kAct, granule, Site{});
    plain.store[unit] = {self->cluster_index, self->epoch, false};
    plain.load[unit].clear();
  }
  mark_unpublished(granule);
}

// Most accesses are of a thread's own arrays and end at the first test.
template <void (*kAct)(std::uint32_t, int, int)>
inline void on_access(void const* address, std::size_t bytes, void* from) {
  if (self == nullptr) { return; }
  std::size_t const offset = static_cast<std::size_t>(static_cast<char const*>(address) - cta->shared);
  if (offset >= cta->shared_bytes) { return; }
  pc = reinterpret_cast<std::uintptr_t>(from);
  std::size_t const end = std::min<std::size_t>(offset + bytes, cta->shared_bytes);
  for (std::size_t at = offset; at < end;) {
    std::size_t const granule = at / kGranule;
    std::size_t const stop = std::min(end, (granule + 1) * kGranule);
    kAct(static_cast<std::uint32_t>(granule), static_cast<int>(at - granule * kGranule), static_cast<int>(stop - granule * kGranule));
    at = stop;
  }
  pc = 0;
}

}  // namespace

std::uintptr_t plain_access_pc() { return pc; }

// Atomics need no order among themselves, but one with the plain accesses of other threads.
int shared_atomic_add(int* address, int value, Site site) {
  constexpr char const* kAct = "an atomic";
  let_others_run(site);
  auto const offset = static_cast<std::size_t>(reinterpret_cast<char*>(address) - cta->shared);
  if (offset + sizeof(int) > cta->shared_bytes) { fault(site, "an atomic of shared memory outside it"); }
  if (offset % sizeof(int) != 0) { fault(site, "an atomic at an address that is not a multiple of %zu bytes", sizeof(int)); }
  auto const granule = static_cast<std::uint32_t>(offset / kGranule);
  check_unused(self->clock, kAct, granule, region(granule * kGranule, kGranule), site);
  PlainAccess& plain = plain_access(granule);
  int const first = static_cast<int>(offset % kGranule) / PlainAccess::kUnitBytes;
  for (int unit = first; unit < first + static_cast<int>(sizeof(int)) / PlainAccess::kUnitBytes; ++unit) {
    if (!plain.store[unit].is_atomic) { check_store_known(self->clock, plain, unit, kAct, granule, site); }
    check_loads_known(self->clock, plain, unit, kAct, granule, site);
    if (is_unwritten(plain, unit, granule)) { fault(site, "an atomic on %s, which nobody wrote", region(static_cast<std::uint32_t>(offset), sizeof(int)).c_str()); }
    plain.store[unit] = {self->cluster_index, self->epoch, true};
    plain.load[unit].clear();
  }
  mark_unpublished(granule);
  int const before = *address;
  *address = before + value;
  return before;
}

void check_plain(Clock const& known, char const* act, std::uint32_t granule, bool overwrites, Site site) {
  if (cta->plain.empty() || cta->plain[granule] == nullptr) { return; }
  PlainAccess const& plain = *cta->plain[granule];
  for (int unit = 0; unit < PlainAccess::kUnits; ++unit) {
    check_store_known(known, plain, unit, act, granule, site);
    if (overwrites) { check_loads_known(known, plain, unit, act, granule, site); }
  }
  if (overwrites) { cta->plain[granule] = nullptr; }
}

void mark_unpublished(std::uint32_t granule) {
  if (cta->granule[granule].is_unpublished) { return; }
  cta->granule[granule].is_unpublished = true;
  cta->unpublished.push_back(granule);
}

// A fence publishes what its thread wrote and what it knows that others did.
void fence_async_proxy(Site site) {
  std::size_t kept = 0;
  for (std::uint32_t const granule : cta->unpublished) {
    Access const* const access = cta->access.empty() ? nullptr : &cta->access[granule];
    bool const knows_act = access == nullptr || (knows(self->clock.copies, access->copier, access->copy) &&
                                                 self->clock.at[cta->access_entry(access->writer)] >= access->write);
    bool knows_all = knows_act;
    for (int unit = 0; unit < PlainAccess::kUnits; ++unit) {
      PlainAccess const* const plain = cta->plain.empty() ? nullptr : cta->plain[granule].get();
      bool const is_stored = plain != nullptr && plain->store[unit].thread >= 0;
      if (!(is_stored ? knows(self->clock.plain, plain->store[unit].thread, plain->store[unit].epoch) : knows_act)) {
        knows_all = false;
        continue;
      }
      std::uint32_t const at = granule * kGranule + unit * PlainAccess::kUnitBytes;
      std::memcpy(cta->published.data() + at, cta->shared + at, PlainAccess::kUnitBytes);
    }
    cta->granule[granule].is_unpublished = !knows_all;
    if (!knows_all) { cta->unpublished[kept++] = granule; }
  }
  cta->unpublished.resize(kept);
  let_others_run(site);
}

}  // namespace cutlass_fa::executor

// ---- what the compiler calls -------------------------------------------------------------------------------------------------------

using cutlass_fa::executor::load;
using cutlass_fa::executor::on_access;
using cutlass_fa::executor::store;

#define CUTLASS_FA_ACCESS(name, act, bytes) \
  void name(void* address) { on_access<act>(address, bytes, __builtin_return_address(0)); }
#define CUTLASS_FA_ACCESSES(bytes)                               \
  CUTLASS_FA_ACCESS(__tsan_read##bytes, load, bytes)             \
  CUTLASS_FA_ACCESS(__tsan_write##bytes, store, bytes)           \
  CUTLASS_FA_ACCESS(__tsan_unaligned_read##bytes, load, bytes)   \
  CUTLASS_FA_ACCESS(__tsan_unaligned_write##bytes, store, bytes)

extern "C" {
CUTLASS_FA_ACCESSES(1)
CUTLASS_FA_ACCESSES(2)
CUTLASS_FA_ACCESSES(4)
CUTLASS_FA_ACCESSES(8)
CUTLASS_FA_ACCESSES(16)

void __tsan_read_range(void* address, std::size_t bytes) { on_access<load>(address, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* address, std::size_t bytes) { on_access<store>(address, bytes, __builtin_return_address(0)); }
void __tsan_init() {}
}
