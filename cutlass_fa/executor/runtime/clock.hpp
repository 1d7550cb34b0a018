// SPDX-License-Identifier: BSD-3-Clause
// What a thread knows of the others.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cutlass_fa::executor {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxWarpgroups = kMaxThreads / kWarpgroup;
constexpr int kMaxMbarriers = 64;
constexpr int kMaxClusterCtas = 2;
constexpr int kNamedBarriers = 15;  // the hardware's sixteenth is __syncthreads'

constexpr int kFirstAccess = kMaxWarps + kMaxMbarriers;
constexpr int kCtaEntries = kFirstAccess + kMaxWarps;

extern std::size_t clock_entries;  // of the launch's clusters: kCtaEntries for each CTA

// A vector clock: what a thread knows to be over. Each CTA of the cluster has kCtaEntries entries (Cta's *_entry functions find them).
// Entry w: how many wgmmas of warp w (its `seq`). Entry kMaxWarps + b: 1 when mbarrier b is initialised, plus its phases that have ended.
// Entry kFirstAccess + w: how many ldmatrix and stmatrix of warp w. Synchronisation merges clocks; whatever an act needs to be over must
// be in its thread's clock, so that a missing barrier shows on every schedule, not only on the unlucky one.
struct Clock {
  std::array<std::uint32_t, kMaxClusterCtas * kCtaEntries> at{};
  // By thread of the cluster: its cp.asyncs that have landed, its TMA stores that have read their source, its acts on the shared memory of
  // other CTAs, its plain loads and stores of shared memory (Thread::epoch). Empty until there was one.
  std::vector<std::uint32_t> copies, stores, remote_acts, plain;

  void merge(Clock const& other) {
    for (std::size_t i = 0; i < clock_entries; ++i) { at[i] = other.at[i] > at[i] ? other.at[i] : at[i]; }
    merge_into(copies, other.copies);
    merge_into(stores, other.stores);
    merge_into(remote_acts, other.remote_acts);
    merge_into(plain, other.plain);
  }

  void clear() {
    at.fill(0);
    for (auto* each : {&copies, &stores, &remote_acts, &plain}) { each->clear(); }
  }

  // Notes that what `thread` has done up to `seq` is over.
  static void set(std::vector<std::uint32_t>& mine, int thread, std::uint32_t seq) {
    if (mine.size() <= static_cast<std::size_t>(thread)) { mine.resize(static_cast<std::size_t>(thread) + 1); }
    mine[static_cast<std::size_t>(thread)] = seq;
  }

 private:
  static void merge_into(std::vector<std::uint32_t>& mine, std::vector<std::uint32_t> const& other) {
    if (mine.size() < other.size()) { mine.resize(other.size()); }
    for (std::size_t i = 0; i < other.size(); ++i) { mine[i] = other[i] > mine[i] ? other[i] : mine[i]; }
  }
};

}  // namespace cutlass_fa::executor
