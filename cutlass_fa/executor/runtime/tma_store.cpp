// SPDX-License-Identifier: BSD-3-Clause
// TMA stores and reductions: the box is read some time before tma_store_wait_read and written some time before tma_store_wait.
#include <algorithm>
#include <cstring>

#include "box.hpp"
#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

// The bytes that the copy engine reads are there, written and visible to it.
void check_source(AsyncStore const& store, std::uint32_t bytes) {
  char const* const act = store.name;
  for (std::uint32_t at = store.offset; at < store.offset + bytes; at += kGranule) {
    check_landed(self->clock, act, at, store.site);
    check_written(act, at, store.site);
    if (std::memcmp(cta->shared + at, cta->published.data() + at, kGranule) != 0) {
      fault(store.site, "%s reads %s, written by plain stores that no fence_async_proxy has followed", act, region(at, kGranule).c_str());
    }
  }
}

void store_row(AsyncStore const& store, std::uint64_t address, std::uint32_t linear) {
  TensorMapFields const& map = store.map;
  for (int i = 0; i < map.box[0]; ++i) {
    std::int64_t const column = static_cast<std::int64_t>(store.coordinates[0]) + i;
    if (column < 0 || column >= map.extents[0]) { continue; }
    std::uint32_t const at = store.offset + linear + i * map.element_bytes;
    std::uint32_t const unit = swizzled_offset(map, at / kGranule * kGranule) - store.offset;
    char const* const from = store.content.data() + unit + at % kGranule;
    std::uint64_t const to = address + column * map.element_bytes;
    std::string nearest;
    if (!is_global(to, map.element_bytes, nearest)) {
      fault(store.site, "%s writes address %#llx, outside every buffer (%s)", store.name, static_cast<unsigned long long>(to),
            nearest.c_str());
    }
    auto* const element = reinterpret_cast<void*>(to);
    if (!store.adds) {
      std::memcpy(element, from, map.element_bytes);
      continue;
    }
    float sum, term;
    std::memcpy(&sum, element, sizeof sum);
    std::memcpy(&term, from, sizeof term);
    sum += term;
    std::memcpy(element, &sum, sizeof sum);
  }
}

// The sources of this thread's stores up to `over` have been read: they still hold what they held.
void finish_reads(std::uint32_t over) {
  for (std::uint32_t seq = self->stores_read + 1; seq <= over; ++seq) {
    AsyncStore const& store = *self->stores.find(seq);
    if (std::memcmp(store.content.data(), cta->shared + store.offset, store.content.size()) != 0) {
      fault(store.site, "%s, source of a %s, was written before its wait",
            region(store.offset, static_cast<std::uint32_t>(store.content.size())).c_str(), store.name);
    }
  }
  if (over <= self->stores_read) { return; }
  self->stores_read = over;
  Clock::set(self->clock.stores, self->cluster_index, over);
}

void issue(AsyncStore store, void const* source, std::uint32_t alignment) {
  std::uint32_t const bytes = box_bytes(store.map);
  store.offset = shared_offset(store.name, source, bytes, alignment, store.site);
  check_source(store, bytes);
  store.content.assign(cta->shared + store.offset, cta->shared + store.offset + bytes);
  std::uint32_t const seq = ++self->stores.issued;
  for (std::uint32_t g = store.offset / kGranule; g < (store.offset + bytes) / kGranule; ++g) {
    Access& access = access_to(g);
    access.storer = self->cluster_index;
    access.store = seq;
  }
  Site const site = store.site;
  self->stores.acts.push_back(std::move(store));
  cta->due.push({landing_step(), self->index, seq, true});
  let_others_run(site);
}

}  // namespace

void tma_store(void const* map, void const* source, int const* coordinates, int rank, bool adds, Site site) {
  let_others_run(site);
  AsyncStore store{adds ? "tma_reduce_add" : "tma_store", site, 0, decode_tensor_map(map, site), {}, adds, false, {}};
  if (store.map.rank != rank) { fault(site, "%s with %d coordinates and a tensor map of rank %d", store.name, rank, store.map.rank); }
  if (adds && store.map.element_bytes != sizeof(float)) {
    fault(site, "tma_reduce_add through a tensor map of %d-byte elements: it adds float32 here", store.map.element_bytes);
  }
  for (int d = 0; d < rank; ++d) {
    if (coordinates[d] < 0) { fault(site, "%s at coordinate %d of dimension %d: hardware refuses negative ones", store.name, coordinates[d], d); }
  }
  std::copy_n(coordinates, rank, store.coordinates.begin());
  issue(std::move(store), source, 128);
}

// As a store through a tensor map of one dimension.
void bulk_reduce_add(float* destination, void const* source, int bytes, Site site) {
  let_others_run(site);
  auto const address = reinterpret_cast<std::uint64_t>(destination);
  if (bytes <= 0 || bytes % kGranule != 0 || address % kGranule != 0) {
    fault(site, "bulk_reduce_add of %d bytes to address %#llx: both are multiples of %d", bytes, static_cast<unsigned long long>(address),
          kGranule);
  }
  auto const elements = static_cast<std::uint16_t>(bytes / sizeof(float));  // shared memory holds no more
  AsyncStore store{"bulk_reduce_add", site, 0, {}, {}, true, false, {}};
  store.map.rank = 1;
  store.map.element_bytes = sizeof(float);
  store.map.base = address;
  store.map.extents[0] = store.map.box[0] = elements;
  issue(std::move(store), source, kGranule);
}

void land_store(Thread& thread, std::uint32_t seq) {
  AsyncStore* const store = thread.stores.find(seq);
  if (store == nullptr || store->landed) { return; }  // its thread has waited for it
  for_each_row(store->map, store->coordinates.data(), [&](std::uint64_t address, bool exists, std::uint32_t linear) {
    if (exists) { store_row(*store, address, linear); }
  });
  store->landed = true;
}

void tma_store_commit(Site site) {
  self->stores.groups.push_back(self->stores.issued);
  let_others_run(site);
}

void tma_store_wait(int pending, bool reads_only, Site site) {
  let_others_run(site);
  std::uint32_t const over = self->stores.last_over(pending);
  finish_reads(over);
  if (reads_only) { return; }
  for (std::uint32_t seq = self->stores.first(); seq <= over; ++seq) {
    land_store(*self, seq);
    self->stores.acts.pop_front();
  }
}

void land_stores_at_end() {
  for (auto& thread : cta->thread) {
    for (std::uint32_t seq = thread->stores.first(); seq <= thread->stores.issued; ++seq) { land_store(*thread, seq); }
  }
}

}  // namespace cutlass_fa::executor
