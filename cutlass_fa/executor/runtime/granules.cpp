// SPDX-License-Identifier: BSD-3-Clause
// Who may read 16 bytes of shared memory, and who may overwrite them.
#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

// The products of wgmma and the ldmatrix that read this granule.
void check_readers(Clock const& known, Granule const& granule, char const* act, std::string const& what, Site site) {
  for (std::size_t wg = 0; wg < cta->warpgroup.size(); ++wg) {
    std::uint32_t const seq = granule.read_by[wg];
    for (int w = 0; seq != 0 && w < kWarpgroup / kWarp; ++w) {
      int const warp = static_cast<int>(wg) * (kWarpgroup / kWarp) + w;
      if (known.at[cta->wgmma_entry(warp)] >= seq) { continue; }
      WgmmaOp const* const op = cta->warpgroup[wg].op(seq);
      fault(site, "%s to %s, which warp %d may still be reading as far as this thread knows (a wgmma%s)", act, what.c_str(), warp,
            op != nullptr ? place(op->site).c_str() : ", waited for but not released");
    }
  }
}

void check_accesses(Clock const& known, Access const& access, char const* act, std::string const& what, Site site) {
  if (!knows(known.copies, access.copier, access.copy)) {
    fault(site, "%s to %s, destination of a cp_async that this thread does not know to have landed%s", act, what.c_str(),
          place(access.site).c_str());
  }
  if (!knows(known.stores, access.storer, access.store)) {
    fault(site, "%s to %s, which a tma_store of thread %d may still be reading as far as this thread knows", act, what.c_str(),
          access.storer % cta->threads);
  }
  if (known.at[cta->access_entry(access.writer)] < access.write) {
    fault(site, "%s to %s, which no barrier separates from the store_matrix of warp %d%s", act, what.c_str(), access.writer,
          place(access.site).c_str());
  }
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    if (known.at[cta->access_entry(warp)] < access.read_by[warp]) {
      fault(site, "%s to %s, which warp %d may still be reading as far as this thread knows (load_matrix)", act, what.c_str(), warp);
    }
  }
}

}  // namespace

bool knows(std::vector<std::uint32_t> const& clock, int thread, std::uint32_t seq) {
  return seq == 0 || (static_cast<std::size_t>(thread) < clock.size() && clock[thread] >= seq);
}

Access& access_to(std::uint32_t granule) {
  if (cta->access.empty()) { cta->access.resize(cta->granule.size()); }
  return cta->access[granule];
}

std::uint32_t shared_offset(char const* act, void const* pointer, std::uint32_t bytes, std::uint32_t alignment, Site site) {
  auto const* const at = static_cast<char const*>(pointer);
  if (at < cta->shared || at + bytes > cta->shared + cta->shared_bytes) {
    fault(site, "%s of %u bytes at shared byte %td: shared memory has %u", act, bytes, at - cta->shared, cta->shared_bytes);
  }
  auto const offset = static_cast<std::uint32_t>(at - cta->shared);
  if (offset % alignment != 0) { fault(site, "%s at shared byte %u: must be a multiple of %u", act, offset, alignment); }
  return offset;
}

void check_written(char const* act, std::uint32_t offset, Site site) {
  for (int i = 0; i < kGranule; ++i) {
    if (static_cast<unsigned char>(cta->shared[offset + i]) != kPoison) { return; }
  }
  fault(site, "%s reads %s, which nobody wrote", act, region(offset, kGranule).c_str());
}

void check_copied(Clock const& known, char const* act, std::uint32_t offset, Site site) {
  std::uint32_t const copied = cta->granule[offset / kGranule].copy;
  if (copied != 0) {
    Copy const& copy = cta->copies[copied - 1];
    bool const is_known = copy.landed && known.at[cta->mbarrier_entry(copy.barrier)] >= copy.phase + 2;
    if (!is_known) {
      fault(site, "%s reads %s, written by a copy that this thread has not waited for%s", act, region(offset, kGranule).c_str(),
            place(copy.site).c_str());
    }
  }
  if (cta->access.empty()) { return; }
  Access const& access = cta->access[offset / kGranule];
  if (!knows(known.copies, access.copier, access.copy)) {
    fault(site, "%s reads %s, written by a cp_async of thread %d that this thread does not know to have landed%s", act,
          region(offset, kGranule).c_str(), access.copier % cta->threads, place(access.site).c_str());
  }
  if (known.at[cta->access_entry(access.writer)] < access.write) {
    fault(site, "%s reads %s, which no barrier separates from the store_matrix of warp %d%s", act, region(offset, kGranule).c_str(),
          access.writer, place(access.site).c_str());
  }
}

void check_landed(Clock const& known, char const* act, std::uint32_t offset, Site site) {
  check_copied(known, act, offset, site);
  check_plain(known, act, offset / kGranule, false, site);
}

void check_unused(Clock const& known, char const* act, std::uint32_t g, std::string const& what, Site site) {
  Granule const& granule = cta->granule[g];
  if (granule.copy != 0) {
    Copy const& old = cta->copies[granule.copy - 1];
    char const* const verb = old.landed ? "that this thread does not know to have landed" : "in flight";
    if (!old.landed || known.at[cta->mbarrier_entry(old.barrier)] < old.phase + 2) {
      fault(site, "%s to %s, destination of a copy %s%s", act, what.c_str(), verb, place(old.site).c_str());
    }
  }
  check_readers(known, granule, act, what, site);
  if (!cta->access.empty()) { check_accesses(known, cta->access[g], act, what, site); }
}

void check_overwrite(Clock const& known, char const* act, std::uint32_t offset, std::uint32_t bytes, Site site) {
  std::string const what = region(offset, bytes);
  for (std::uint32_t g = offset / kGranule; g < (offset + bytes) / kGranule; ++g) {
    check_unused(known, act, g, what, site);
    check_plain(known, act, g, true, site);
    cta->granule[g].copy = 0;
    cta->granule[g].read_by = {};
    if (!cta->access.empty()) { cta->access[g] = Access{}; }
  }
}

}  // namespace cutlass_fa::executor
