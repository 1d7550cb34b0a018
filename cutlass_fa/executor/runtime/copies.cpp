// SPDX-License-Identifier: BSD-3-Clause
// TMA: boxes of a tensor copied to shared memory, landing some time between their issue and the wait that shows them.
//
// CUDA driver API, cuTensorMapEncodeTiled: box, strides, swizzle modes, zero fill. PTX ISA, "Tensors": swizzling modes.
#include <algorithm>
#include <cstring>

#include "box.hpp"
#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

// Copies one row of the box; `linear` is where it would lie without swizzle.
void copy_row(Copy const& copy, std::uint64_t address, bool exists, std::uint32_t linear) {
  TensorMapFields const& map = copy.map;
  int const row_bytes = map.box[0] * map.element_bytes;
  for (int byte = 0; byte < row_bytes; byte += kGranule) {
    unsigned char unit[kGranule] = {};
    for (int i = 0; exists && i < kGranule; i += map.element_bytes) {
      std::int64_t const column = copy.coordinates[0] + (byte + i) / map.element_bytes;
      if (column < 0 || column >= map.extents[0]) { continue; }
      std::uint64_t const source = address + column * map.element_bytes;
      std::memcpy(unit + i, reinterpret_cast<void const*>(source), map.element_bytes);
    }
    std::memcpy(cta->shared + swizzled_offset(map, linear + byte), unit, kGranule);
  }
}

// The bytes of a row that a copy reads must lie in one of the launch's buffers.
void check_source(Copy const& copy, std::uint64_t address) {
  TensorMapFields const& map = copy.map;
  std::int64_t const first = std::max(copy.coordinates[0], 0);
  std::int64_t const stop = std::min<std::int64_t>(copy.coordinates[0] + map.box[0], map.extents[0]);
  std::string nearest;
  if (first < stop && !is_global(address + first * map.element_bytes, (stop - first) * map.element_bytes, nearest)) {
    fault(copy.site, "tma_load reads address %#llx, outside every buffer (%s)", static_cast<unsigned long long>(address), nearest.c_str());
  }
}

// The copy's part in `cta`: its destination, and the mbarrier it reports to.
void issue_here(Copy copy, std::uint32_t barrier_offset, char const* act) {
  auto const* const state = reinterpret_cast<std::uint64_t const*>(cta->shared + barrier_offset);
  copy.barrier = find_mbarrier(state, copy.site);
  MbarrierState const& barrier = cta->mbarrier[copy.barrier];
  if (!barrier.fenced) {
    fault(copy.site, "%s reports to an mbarrier without fence_mbarrier_init after its init%s", act, place(barrier.site).c_str());
  }
  copy.phase = barrier.phase;
  check_overwrite(self->clock, act, copy.offset, copy.bytes, copy.site);
  int const index = static_cast<int>(cta->copies.size());
  for (std::uint32_t g = copy.offset / kGranule; g < (copy.offset + copy.bytes) / kGranule; ++g) {
    cta->granule[g].copy = index + 1;
  }
  std::memset(cta->shared + copy.offset, kPoison, copy.bytes);
  std::memset(cta->published.data() + copy.offset, kPoison, copy.bytes);
  copy.due = landing_step();
  cta->copies.push_back(copy);
  cta->pending_copies.push_back(index);
}

// The box and where it goes; both lie at the same offsets in every destination.
Copy describe(char const* act, void const* map, void const* destination, int const* coordinates, int rank, Site site) {
  Copy copy;
  copy.site = site;
  copy.map = decode_tensor_map(map, site);
  if (copy.map.rank != rank) { fault(site, "%s with %d coordinates and a tensor map of rank %d", act, rank, copy.map.rank); }
  copy.bytes = box_bytes(copy.map);
  copy.offset = shared_offset(act, destination, copy.bytes, 128, site);
  std::copy_n(coordinates, rank, copy.coordinates.begin());
  return copy;
}

}  // namespace

TensorMapFields decode_tensor_map(void const* map, Site site) {
  TensorMapFields fields;
  std::memcpy(&fields, map, sizeof fields);
  if (fields.magic != TensorMapFields::kMagic) { fault(site, "not a tensor map: the kernel's argument holds other bytes"); }
  return fields;
}

void prefetch_tensor_map(void const* map, Site site) { decode_tensor_map(map, site); }

void tma_load(void const* map, std::uint64_t* state, void* destination, int const* coordinates, int rank, Site site) {
  let_others_run(site);
  Copy const copy = describe("tma_load", map, destination, coordinates, rank, site);
  issue_here(copy, shared_offset("the mbarrier of a tma_load", state, sizeof *state, sizeof *state, site), "tma_load");
  let_others_run(site);
}

void tma_load_multicast(void const* map, std::uint64_t* state, std::uint16_t cta_mask, void* destination, int const* coordinates, int rank,
                        Site site) {
  constexpr char const* kAct = "tma_load_multicast";
  let_others_run(site);
  Copy const copy = describe(kAct, map, destination, coordinates, rank, site);
  std::uint32_t const barrier = shared_offset("the mbarrier of a tma_load_multicast", state, sizeof *state, sizeof *state, site);
  if (cta_mask == 0 || cta_mask >> cluster.size() != 0) {
    fault(site, "%s to the CTAs of mask %#x: the cluster has %d", kAct, cta_mask, cluster.size());
  }
  for (int to = 0; to < cluster.size(); ++to) {
    if ((cta_mask >> to & 1) == 0) { continue; }
    Within const within(to == cta->rank ? *cta : other_cta(kAct, to, site));
    issue_here(copy, barrier, kAct);
  }
  let_others_run(site);
}

void land(int index) {
  Copy& copy = cta->copies[index];
  char const* const there = cta->shared + copy.offset;
  if (!std::all_of(there, there + copy.bytes, [](char byte) { return static_cast<unsigned char>(byte) == kPoison; })) {
    fault(copy.site, "%s was written while a copy to it was in flight", region(copy.offset, copy.bytes).c_str());
  }
  for_each_row(copy.map, copy.coordinates.data(), [&](std::uint64_t address, bool exists, std::uint32_t linear) {
    if (exists) { check_source(copy, address); }
    copy_row(copy, address, exists, copy.offset + linear);
  });
  std::memcpy(cta->published.data() + copy.offset, cta->shared + copy.offset, copy.bytes);
  copy.landed = true;
  if (cta->mbarrier[copy.barrier].phase != copy.phase) { copy.phase = cta->mbarrier[copy.barrier].phase; }
  complete_bytes(copy.barrier, copy.bytes, copy.site);
}

// A copy into the memory of a CTA that has ended would land in another's: some thread has waited for each.
void check_copies_at_end() {
  for (AsyncArrival const& arrival : cta->pending_arrivals) {
    fault(arrival.site, "the CTA ends while an arrival of thread %d's cp.asyncs is to come", arrival.thread);
  }
  for (Copy const& copy : cta->copies) {
    if (!copy.landed || cta->at_end.at[cta->mbarrier_entry(copy.barrier)] < copy.phase + 2) {
      fault(copy.site, "the CTA ends while a copy to %s may be in flight: none of its threads has waited for it",
            region(copy.offset, copy.bytes).c_str());
    }
  }
}

}  // namespace cutlass_fa::executor
