// SPDX-License-Identifier: BSD-3-Clause
// TMA: boxes of a tensor copied to shared memory, landing some time between their issue and the wait that shows them.
//
// CUDA driver API, cuTensorMapEncodeTiled: box, strides, swizzle modes, zero fill. PTX ISA, "Tensors": swizzling modes.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point format

std::uint32_t box_bytes(TensorMapFields const& map) {
  std::uint32_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) { bytes *= map.box[d]; }
  return bytes;
}

TensorMapFields decode(void const* map, Site site) {
  TensorMapFields fields;
  std::memcpy(&fields, map, sizeof fields);
  if (fields.magic != TensorMapFields::kMagic) { fault(site, "not a tensor map: the kernel's argument holds other bytes"); }
  return fields;
}

std::uint32_t destination_offset(void* destination, std::uint32_t bytes, Site site) {
  auto* const at = static_cast<char*>(destination);
  if (at < cta.shared || at + bytes > cta.shared + cta.shared_bytes) {
    fault(site, "tma_load of %u bytes to shared byte %td: shared memory has %u", bytes, at - cta.shared, cta.shared_bytes);
  }
  auto const offset = static_cast<std::uint32_t>(at - cta.shared);
  if (offset % 128 != 0) { fault(site, "tma_load to shared byte %u: must be a multiple of 128", offset); }
  return offset;
}

// This copy overwrites [offset, offset + bytes): everything that still needs the old bytes must be over as far as the issuer knows.
void check_overwrite(std::uint32_t offset, std::uint32_t bytes, Site site) {
  for (std::uint32_t g = offset / kGranule; g < (offset + bytes) / kGranule; ++g) {
    Granule const& granule = cta.granule[g];
    if (granule.copy != 0) {
      Copy const& old = cta.copies[granule.copy - 1];
      char const* const verb = old.landed ? "that this thread does not know to have landed" : "in flight";
      if (!old.landed || self->clock.at[kMaxWarps + old.barrier] < old.phase + 2) {
        fault(site, "tma_load to %s, destination of a copy %s%s", region(offset, bytes).c_str(), verb, place(old.site).c_str());
      }
    }
    for (std::size_t wg = 0; wg < cta.warpgroup.size(); ++wg) {
      std::uint32_t const seq = granule.read_by[wg];
      for (int w = 0; seq != 0 && w < kWarpgroup / kWarp; ++w) {
        int const warp = static_cast<int>(wg) * (kWarpgroup / kWarp) + w;
        if (self->clock.at[warp] >= seq) { continue; }
        WgmmaOp const* const op = cta.warpgroup[wg].op(seq);
        fault(site, "tma_load to %s, which warp %d may still be reading as far as this thread knows (a wgmma%s)",
              region(offset, bytes).c_str(), warp, op != nullptr ? place(op->site).c_str() : ", waited for but not released");
      }
    }
  }
}

// Copies one row of the box; `linear` is where it would lie without swizzle.
void copy_row(Copy const& copy, std::uint64_t address, bool exists, std::uint32_t linear) {
  TensorMapFields const& map = copy.map;
  int const row_bytes = map.box[0] * map.element_bytes;
  std::uint32_t const mask = map.swizzle_bytes == 0 ? 0 : map.swizzle_bytes - kGranule;
  for (int byte = 0; byte < row_bytes; byte += kGranule) {
    std::uint32_t const at = kSharedBase + linear + byte;  // the hardware swizzles addresses, not offsets
    unsigned char unit[kGranule] = {};
    for (int i = 0; exists && i < kGranule; i += map.element_bytes) {
      std::int64_t const column = copy.coordinates[0] + (byte + i) / map.element_bytes;
      if (column < 0 || column >= map.extents[0]) { continue; }
      std::uint64_t const source = address + column * map.element_bytes;
      std::memcpy(unit + i, reinterpret_cast<void const*>(source), map.element_bytes);
    }
    std::memcpy(cta.shared + ((at ^ (at >> 3 & mask)) - kSharedBase), unit, kGranule);
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

}  // namespace

void prefetch_tensor_map(void const* map, Site site) { decode(map, site); }

void tma_load(void const* map, std::uint64_t* state, void* destination, int const* coordinates, int rank, Site site) {
  let_others_run(site);
  Copy copy;
  copy.site = site;
  copy.map = decode(map, site);
  if (copy.map.rank != rank) { fault(site, "tma_load with %d coordinates and a tensor map of rank %d", rank, copy.map.rank); }
  copy.bytes = box_bytes(copy.map);
  copy.offset = destination_offset(destination, copy.bytes, site);
  copy.barrier = find_mbarrier(state, site);
  MbarrierState const& barrier = cta.mbarrier[copy.barrier];
  if (!barrier.fenced) {
    fault(site, "tma_load reports to an mbarrier without fence_mbarrier_init after its init%s", place(barrier.site).c_str());
  }
  copy.phase = barrier.phase;
  for (int d = 0; d < rank; ++d) { copy.coordinates[d] = coordinates[d]; }
  check_overwrite(copy.offset, copy.bytes, site);
  int const index = static_cast<int>(cta.copies.size());
  for (std::uint32_t g = copy.offset / kGranule; g < (copy.offset + copy.bytes) / kGranule; ++g) {
    cta.granule[g] = Granule{};
    cta.granule[g].copy = index + 1;
  }
  std::memset(cta.shared + copy.offset, kPoison, copy.bytes);
  std::memset(cta.published.data() + copy.offset, kPoison, copy.bytes);
  copy.due = landing_step();
  cta.copies.push_back(copy);
  cta.pending_copies.push_back(index);
  let_others_run(site);
}

void land(int index) {
  Copy& copy = cta.copies[index];
  TensorMapFields const& map = copy.map;
  std::uint32_t linear = copy.offset;
  std::array<int, 5> position{};  // within the box, dimensions 1 and up
  for (std::uint32_t row = 0; row * map.box[0] * map.element_bytes < copy.bytes; ++row) {
    std::uint64_t address = map.base;
    bool exists = true;
    for (int d = 1; d < map.rank; ++d) {
      std::int64_t const coordinate = static_cast<std::int64_t>(copy.coordinates[d]) + position[d];
      exists = exists && coordinate >= 0 && coordinate < map.extents[d];
      address += coordinate * map.strides[d - 1];
    }
    if (exists) { check_source(copy, address); }
    copy_row(copy, address, exists, linear);
    linear += map.box[0] * map.element_bytes;
    for (int d = 1; d < map.rank && ++position[d] == map.box[d]; ++d) { position[d] = 0; }
  }
  std::memcpy(cta.published.data() + copy.offset, cta.shared + copy.offset, copy.bytes);
  copy.landed = true;
  if (cta.mbarrier[copy.barrier].phase != copy.phase) { copy.phase = cta.mbarrier[copy.barrier].phase; }
  complete_bytes(copy.barrier, copy.bytes, copy.site);
}

}  // namespace cutlass_fa::executor
