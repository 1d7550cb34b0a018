// SPDX-License-Identifier: BSD-3-Clause
// Which fiber runs next and when copies land. The seed draws a policy and then every choice, so a seed is a schedule.
//
// Policies: `fair` picks any fiber; the others give each warp a random priority and change it now and then, as probabilistic concurrency
// testing does (Burckhardt et al., ASPLOS 2010), so that one warp starves while another runs as far as it can.
#include <bit>

#include <cutlass_fa_executor/cuda_words.hpp>

#include "machine.hpp"

CutlassFaIndex threadIdx, blockIdx, gridDim, blockDim;

namespace cutlass_fa::executor {

std::size_t clock_entries = 0;
Cluster cluster;
Cta* cta = nullptr;
Thread* self = nullptr;
Random hostility{0};

namespace {

enum class Landing { kEarliest, kLatest, kAny };

struct Policy {
  bool fair = true;
  Landing landing = Landing::kAny;
  std::array<std::uint32_t, kMaxClusterCtas * kMaxWarps> priority{};  // of each CTA's warps
  std::uint64_t next_change = 0;
};

constexpr std::uint32_t kMeanStepsBetweenChanges = 2000;
constexpr std::uint32_t kLongestDelay = 4000;  // steps a copy of Landing::kAny may take

Policy policy;
std::uint64_t step = 0;
void (*entry)() = nullptr;

// Every other time whole warpgroups rank behind each other, so that a producer or a consumer is left behind as one; and every other time
// whole CTAs of a cluster.
void change_priorities() {
  for (auto const& each : cluster.cta) {
    bool const by_warpgroup = hostility.below(2) == 0;
    bool const by_cta = cluster.size() > 1 && hostility.below(2) == 0;
    std::uint32_t const cta_rank = by_cta ? hostility.below(1u << 6) << 24 : 0;
    std::array<std::uint32_t, kMaxWarpgroups> rank{};
    for (auto& mine : rank) { mine = by_warpgroup ? hostility.below(1u << 8) << 16 : 0; }
    for (int w = 0; w < kMaxWarps; ++w) {
      policy.priority[each->rank * kMaxWarps + w] = cta_rank + rank[w * kWarp / kWarpgroup] + hostility.below(1u << 16);
    }
  }
  policy.next_change = step + 1 + hostility.below(2 * kMeanStepsBetweenChanges);
}

// The body of every fiber.
void fiber_main() {
  entry();
  check_wgmma_at_end();
  check_async_at_end();
  self->finished = true;
  cta->at_end.merge(self->clock);
  --cta->live;
  --cluster.live;
  cta->runnable[self->warp()] &= ~(1u << self->index % kWarp);
  leave_cluster_barrier();
  self->fiber.suspend();
}

struct WarpChoice {
  Cta* cta = nullptr;
  int warp = 0;
};

WarpChoice pick_warp() {
  int const warps_per_cta = static_cast<int>(cluster.cta[0]->warp.size());
  int const warps = warps_per_cta * cluster.size();
  int const start = policy.fair ? static_cast<int>(hostility.below(static_cast<std::uint32_t>(warps))) : 0;
  WarpChoice best;
  std::uint32_t highest = 0;
  for (int i = 0; i < warps; ++i) {
    int const at = start + i < warps ? start + i : start + i - warps;
    WarpChoice const choice{cluster.cta[at / warps_per_cta].get(), at % warps_per_cta};
    if (choice.cta->runnable[choice.warp] == 0) { continue; }
    if (policy.fair) { return choice; }
    std::uint32_t const priority = policy.priority[choice.cta->rank * kMaxWarps + choice.warp];
    if (best.cta != nullptr && priority <= highest) { continue; }
    best = choice;
    highest = priority;
  }
  return best;
}

int pick_lane(std::uint32_t runnable) {
  int const skip = policy.fair ? static_cast<int>(hostility.below(kWarp)) : 0;
  std::uint32_t const rotated = std::rotr(runnable, skip);
  return (std::countr_zero(rotated) + skip) % kWarp;
}

void end_cta() {
  land_stores_at_end();
  check_copies_at_end();
  check_cluster_at_end();
  check_registers_at_end();
}

void resume(Cta& of, int index) {
  Thread& thread = *of.thread[index];
  cta = &of;
  self = &thread;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
  blockIdx = {static_cast<unsigned>(of.index), 0, 0};
  thread.fiber.resume();
  self = nullptr;
  cta = &of;
  if (of.live == 0) { end_cta(); }
}

template <class Item>
Item take(std::vector<Item>& items, std::size_t i) {
  Item const item = items[i];
  items[i] = items.back();
  items.pop_back();
  return item;
}

// Lands every copy of `cta` that is due, and lets every arrival come that is.
void land_due_copies() {
  auto& pending = cta->pending_copies;
  for (std::size_t i = 0; i < pending.size();) {
    if (cta->copies[pending[i]].due > step) {
      ++i;
      continue;
    }
    land(take(pending, i));
  }
  auto& arrivals = cta->pending_arrivals;
  for (std::size_t i = 0; i < arrivals.size();) {
    if (arrivals[i].due > step) {
      ++i;
      continue;
    }
    land_async_arrival(take(arrivals, i));
  }
}

// Lands a copy, or lets an arrival come, that is not due yet; false when there is none in the whole cluster.
bool land_something() {
  std::size_t total = 0;
  for (auto const& each : cluster.cta) { total += each->pending_copies.size() + each->pending_arrivals.size(); }
  if (total == 0) { return false; }
  std::size_t i = hostility.below(static_cast<std::uint32_t>(total));
  for (auto const& each : cluster.cta) {
    Within const within(*each);
    if (i < each->pending_copies.size()) {
      land(take(each->pending_copies, i));
      return true;
    }
    i -= each->pending_copies.size();
    if (i < each->pending_arrivals.size()) {
      land_async_arrival(take(each->pending_arrivals, i));
      return true;
    }
    i -= each->pending_arrivals.size();
  }
  return false;
}

void land_due_acts() {
  while (!cta->due.empty() && cta->due.top().step <= step) {
    Due const due = cta->due.top();
    cta->due.pop();
    (due.is_store ? land_store : land_async_copy)(*cta->thread[due.thread], due.seq);
  }
}

void land_what_is_due() {
  for (auto const& each : cluster.cta) {
    Within const within(*each);
    land_due_copies();
    land_due_acts();
  }
}

}  // namespace

std::uint64_t Random::next() {  // splitmix64 (Steele, Lea and Flood 2014)
  std::uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}

void seed_hostility(std::uint64_t seed) {
  hostility = Random(seed * 0x2545F4914F6CDD1Dull + 1);
  // The first seeds go through the policies in turn, so that six seeds see all of them.
  constexpr Landing kLandings[] = {Landing::kLatest, Landing::kEarliest, Landing::kAny};
  policy = Policy{};
  policy.landing = kLandings[seed % 3];
  policy.fair = seed % 2 == 1;
}

std::uint64_t landing_step() {
  switch (policy.landing) {
    case Landing::kEarliest: return step;
    case Landing::kLatest: return ~0ull;
    case Landing::kAny: break;
  }
  return hostility.below(4) == 0 ? ~0ull : step + hostility.below(kLongestDelay);
}

void run_cluster(void (*kernel)()) {
  entry = kernel;
  step = 0;
  change_priorities();
  for (auto const& each : cluster.cta) {
    for (auto& thread : each->thread) {
      thread->fiber.start(fiber_main);
      wake(*thread);
    }
  }
  while (cluster.live > 0) {
    ++step;
    if (step >= policy.next_change) { change_priorities(); }
    land_what_is_due();
    WarpChoice choice = pick_warp();
    while (choice.cta == nullptr && land_something()) { choice = pick_warp(); }
    if (choice.cta == nullptr) { report_deadlock(); }
    resume(*choice.cta, choice.warp * kWarp + pick_lane(choice.cta->runnable[choice.warp]));
  }
}

void block(WaitKind kind, int id, std::uint32_t detail, Site site) {
  self->wait = {kind, id, detail, site};
  self->last = site;
  cta->runnable[self->warp()] &= ~(1u << self->index % kWarp);
  self->fiber.suspend();
}

void wake(Thread& thread) {
  thread.wait.kind = WaitKind::kNone;
  thread.cta->runnable[thread.warp()] |= 1u << thread.index % kWarp;
}

void let_others_run(Site site) {
  self->last = site;
  if (hostility.below(2) == 0) { self->fiber.suspend(); }
}

}  // namespace cutlass_fa::executor
