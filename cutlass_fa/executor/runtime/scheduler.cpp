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

Cta cta;
Thread* self = nullptr;
Random hostility{0};

namespace {

enum class Landing { kEarliest, kLatest, kAny };

struct Policy {
  bool fair = true;
  Landing landing = Landing::kAny;
  std::array<std::uint32_t, kMaxWarps> priority{};
  std::uint64_t next_change = 0;
};

constexpr std::uint32_t kMeanStepsBetweenChanges = 2000;
constexpr std::uint32_t kLongestDelay = 4000;  // steps a copy of Landing::kAny may take

Policy policy;
std::uint64_t step = 0;
void (*entry)() = nullptr;

// Every other time whole warpgroups rank behind each other, so that a producer or a consumer is left behind as one.
void change_priorities() {
  bool const by_warpgroup = hostility.below(2) == 0;
  std::array<std::uint32_t, kMaxWarpgroups> rank{};
  for (auto& each : rank) { each = by_warpgroup ? hostility.below(1u << 8) << 16 : 0; }
  for (std::size_t w = 0; w < policy.priority.size(); ++w) {
    policy.priority[w] = rank[w * kWarp / kWarpgroup] + hostility.below(1u << 16);
  }
  policy.next_change = step + 1 + hostility.below(2 * kMeanStepsBetweenChanges);
}

// The body of every fiber.
void fiber_main() {
  entry();
  check_wgmma_at_end();
  check_async_at_end();
  self->finished = true;
  --cta.live;
  cta.runnable[self->warp()] &= ~(1u << self->index % kWarp);
  self->fiber.suspend();
}

int pick_warp() {
  int const warps = static_cast<int>(cta.warp.size());
  if (!policy.fair) {
    int best = -1;
    for (int w = 0; w < warps; ++w) {
      if (cta.runnable[w] != 0 && (best < 0 || policy.priority[w] > policy.priority[best])) { best = w; }
    }
    return best;
  }
  int const start = static_cast<int>(hostility.below(static_cast<std::uint32_t>(warps)));
  for (int i = 0; i < warps; ++i) {
    int const w = (start + i) % warps;
    if (cta.runnable[w] != 0) { return w; }
  }
  return -1;
}

int pick_lane(std::uint32_t runnable) {
  int const skip = policy.fair ? static_cast<int>(hostility.below(kWarp)) : 0;
  std::uint32_t const rotated = std::rotr(runnable, skip);
  return (std::countr_zero(rotated) + skip) % kWarp;
}

void resume(Thread& thread) {
  self = &thread;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
  thread.fiber.resume();
  self = nullptr;
}

// Lands every copy that is due; with `force`, at least one.
void land_due_copies(bool force) {
  auto& pending = cta.pending_copies;
  for (std::size_t i = 0; i < pending.size();) {
    if (cta.copies[pending[i]].due > step) {
      ++i;
      continue;
    }
    int const copy = pending[i];
    pending[i] = pending.back();
    pending.pop_back();
    force = false;
    land(copy);
  }
  if (force && !pending.empty()) {
    std::size_t const i = hostility.below(static_cast<std::uint32_t>(pending.size()));
    int const copy = pending[i];
    pending[i] = pending.back();
    pending.pop_back();
    land(copy);
  }
}

void land_due_acts() {
  while (!cta.due.empty() && cta.due.top().step <= step) {
    Due const due = cta.due.top();
    cta.due.pop();
    (due.is_store ? land_store : land_async_copy)(*cta.thread[due.thread], due.seq);
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

void run_cta(void (*kernel)()) {
  entry = kernel;
  step = 0;
  change_priorities();
  for (auto& thread : cta.thread) {
    thread->fiber.start(fiber_main);
    wake(*thread);
  }
  while (cta.live > 0) {
    ++step;
    if (step >= policy.next_change) { change_priorities(); }
    if (!cta.pending_copies.empty()) { land_due_copies(false); }
    land_due_acts();
    int warp = pick_warp();
    while (warp < 0 && !cta.pending_copies.empty()) {
      land_due_copies(true);
      warp = pick_warp();
    }
    if (warp < 0) { report_deadlock(); }
    resume(*cta.thread[warp * kWarp + pick_lane(cta.runnable[warp])]);
  }
  land_stores_at_end();
  check_cta_end();
}

void block(WaitKind kind, int id, std::uint32_t detail, Site site) {
  self->wait = {kind, id, detail, site};
  self->last = site;
  cta.runnable[self->warp()] &= ~(1u << self->index % kWarp);
  self->fiber.suspend();
}

void wake(Thread& thread) {
  thread.wait.kind = WaitKind::kNone;
  cta.runnable[thread.warp()] |= 1u << thread.index % kWarp;
}

void let_others_run(Site site) {
  self->last = site;
  if (hostility.below(2) == 0) { self->fiber.suspend(); }
}

}  // namespace cutlass_fa::executor
