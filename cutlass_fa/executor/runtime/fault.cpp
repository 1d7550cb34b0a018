// SPDX-License-Identifier: BSD-3-Clause
// Reports. A fault ends the process: its text goes to stderr, where the Python side reads it.
#include <cstdarg>
#include <cstdio>
#include <map>
#include <unistd.h>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

constexpr int kFaultStatus = 70;

char const* kind_name(WaitKind kind) {
  switch (kind) {
    case WaitKind::kBlockSync: return "block_sync";
    case WaitKind::kNamedBarrier: return "named_barrier_sync";
    case WaitKind::kMbarrier: return "mbarrier wait";
    case WaitKind::kWarp: return "a shuffle, vote, warp_sync or matrix instruction, for the other lanes of its warp";
    case WaitKind::kRegisters: return "grow_registers_to";
    case WaitKind::kWgmma: return "wgmma_wait, for the other threads of its warpgroup to issue the product";
    case WaitKind::kCluster: return "cluster_wait";
    case WaitKind::kNone: break;
  }
  return "nothing";
}

std::string text(char const* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(char const* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string describe(Wait const& wait) {
  std::string what = kind_name(wait.kind);
  if (wait.kind == WaitKind::kNamedBarrier || wait.kind == WaitKind::kBlockSync) {
    NamedBarrier const& barrier = cta->barrier[wait.id];
    if (wait.kind == WaitKind::kNamedBarrier) { what += text(" %d", wait.id); }
    what += text(", %d of %d threads there", barrier.count, barrier.expected);
  } else if (wait.kind == WaitKind::kMbarrier) {
    MbarrierState const& barrier = cta->mbarrier[wait.id];
    what += text(" on the mbarrier at %s, parity %u; %u phases ended, %u of %u arrivals and %lld bytes missing",
                 region(barrier.offset, 8).c_str(), wait.detail, barrier.phase, barrier.pending, barrier.arrivals,
                 static_cast<long long>(barrier.bytes));
  } else if (wait.kind == WaitKind::kCluster) {
    what += text(", %d of the cluster's %d threads have arrived", cluster.arrived, cluster.live);
  } else if (wait.kind == WaitKind::kRegisters) {
    what += text("<%d>, with %d registers of the CTA free", wait.id, cta->free_registers);
  }
  return what + place(wait.site);
}

std::string name_of(Cta const& which) {
  std::string const name = text("CTA %d", which.index);
  return cluster.size() == 1 ? name : name + text(" (rank %d of its cluster)", which.rank);
}

// "0-31, 64": the threads of a set.
std::string ranges(std::vector<int> const& threads) {
  std::string out;
  for (std::size_t i = 0; i < threads.size();) {
    std::size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) { ++j; }
    out += text("%s%d", out.empty() ? "" : ", ", threads[i]);
    if (j > i) { out += text("-%d", threads[j]); }
    i = j + 1;
  }
  return out;
}

}  // namespace

std::string place(Site site) { return site.line == 0 ? std::string() : text(" at %s:%d", site.file, site.line); }

std::string region(std::uint32_t offset, std::uint32_t bytes) {
  std::string const where = text("shared [%u, %u)", offset, offset + bytes);
  return cluster.size() == 1 ? where : where + text(" of CTA rank %d", cta->rank);
}

void fault(Site site, char const* format, ...) {
  std::fprintf(stderr, "fault: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n  %s", name_of(self != nullptr ? *self->cta : *cta).c_str());
  if (self != nullptr) {
    std::fprintf(stderr, ", thread %d (warpgroup %d, warp %d, lane %d)", self->index, self->warpgroup(), self->warp(), self->index % kWarp);
  }
  std::fprintf(stderr, "%s\n", place(site).c_str());
  if (plain_access_pc() != 0) { std::fprintf(stderr, "  pc %#zx\n", plain_access_pc() - 1); }  // inside the call, not behind it
  std::fflush(stderr);
  _exit(kFaultStatus);
}

void report_deadlock() {
  std::string where, waits;
  for (auto const& each : cluster.cta) {
    Within const within(*each);
    std::map<std::string, std::vector<int>> waiting;
    for (auto const& thread : each->thread) {
      if (!thread->finished) { waiting[describe(thread->wait)].push_back(thread->index); }
    }
    where += (where.empty() ? "" : " or ") + name_of(*each);
    if (cluster.size() > 1) { waits += "  " + name_of(*each) + (waiting.empty() ? ": has ended\n" : ":\n"); }
    for (auto const& [what, threads] : waiting) { waits += "  threads " + ranges(threads) + " wait in " + what + "\n"; }
  }
  std::fprintf(stderr, "deadlock: no thread of %s can run and no copy is in flight\n%s", where.c_str(), waits.c_str());
  std::fflush(stderr);
  _exit(kFaultStatus);
}

}  // namespace cutlass_fa::executor
