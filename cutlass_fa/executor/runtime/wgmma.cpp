// SPDX-License-Identifier: BSD-3-Clause
// WGMMA in flight. A warpgroup's products are numbered; each thread joins product after product without waiting for the others, and a
// product is computed when all 128 have joined. Its accumulators hold poison from the join until the thread has waited and pinned them.
#include <algorithm>
#include <cstring>

#include "machine.hpp"
#include "operands.hpp"

namespace cutlass_fa::executor {
namespace {

constexpr std::uint32_t kAccumulatorPoison = 0x7FA5DEAD;  // a signalling NaN that no arithmetic produces

// Register i of a thread's accumulators: PTX ISA, "Register fragments for wgmma.mma_async", matrix D.
int row_of(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + (i >> 1 & 1) * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

bool is_poison(float const* d, int count) {
  for (int i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, d + i, sizeof bits);
    if (bits != kAccumulatorPoison) { return false; }
  }
  return true;
}

void compute(WgmmaOp& op) {
  typedef float Lanes __attribute__((vector_size(32)));
  constexpr int kLanes = 8;
  int const columns = op.call.columns;
  if (!op.call.accumulate) { std::fill_n(op.tile->values.begin(), 64 * columns, 0.0f); }
  for (int m = 0; m < 64; m += 4) {
    for (int n = 0; n < columns; n += kLanes) {
      Lanes sum[4];
      for (int i = 0; i < 4; ++i) { std::memcpy(&sum[i], &op.tile->values[(m + i) * columns + n], sizeof sum[i]); }
      for (int k = 0; k < op.call.depth(); ++k) {
        Lanes b;
        std::memcpy(&b, &op.b[k][n], sizeof b);
        for (int i = 0; i < 4; ++i) { sum[i] += op.a[m + i][k] * b; }
      }
      for (int i = 0; i < 4; ++i) { std::memcpy(&op.tile->values[(m + i) * columns + n], &sum[i], sizeof sum[i]); }
    }
  }
}

WgmmaOp& new_op(Warpgroup& group, WgmmaCall const& call, std::uint32_t seq, Site site) {
  if (group.spare.empty()) { group.spare.push_back(std::make_unique<WgmmaOp>()); }
  std::unique_ptr<WgmmaOp> op = std::move(group.spare.back());
  group.spare.pop_back();
  op->call = call;
  op->site = site;
  op->issued = op->finished = 0;
  op->rechecked = false;
  op->tile = nullptr;
  op->needs.clear();
  op->origin.clear();
  op->granules.clear();
  op->reads.clear();
  group.ops.push_back(std::move(op));
  read_operands(*group.ops.back(), self->warpgroup(), seq);
  return *group.ops.back();
}

void check_same(WgmmaOp const& op, WgmmaCall const& call, Site site) {
  WgmmaCall const& other = op.call;
  bool const same = other.columns == call.columns && (other.a == nullptr) == (call.a == nullptr) &&
                    other.descriptor_a == call.descriptor_a && other.descriptor_b == call.descriptor_b && other.element == call.element &&
                    other.element_b == call.element_b &&
                    other.b_is_mn_major == call.b_is_mn_major && other.accumulate == call.accumulate;
  if (!same) { fault(site, "threads of one warpgroup issue different products, the other%s", place(op.site).c_str()); }
}

// The copies that the operands came from must be over as far as this very thread knows.
void check_needs(WgmmaOp const& op, Site site) {
  for (std::uint32_t const offset : op.granules) { check_landed(self->clock, "wgmma", offset, site); }
  for (std::size_t i = 0; i < op.needs.size(); ++i) {
    auto const [entry, least] = op.needs[i];
    if (self->clock.at[entry] >= least) { continue; }
    auto const [copy, offset] = op.origin[i];
    fault(site, "wgmma reads %s, written by a copy that this thread has not waited for%s", region(offset, kGranule).c_str(),
          place(cta->copies[copy].site).c_str());
  }
}

// Registers go into a product as they were at the latest pin, and a fence lies between the pin and the product.
void check_pinned(std::uint32_t const* words, int count, char const* what, Site site) {
  for (Pin const& pin : self->pins) {
    if (words < pin.words || words + count > pin.words + pin.content.size()) { continue; }
    if (!pin.fenced) { fault(site, "no wgmma_fence between pin_registers%s and the wgmma that uses %s", place(pin.site).c_str(), what); }
    if (std::memcmp(words, pin.content.data() + (words - pin.words), count * sizeof *words) == 0) { return; }
    fault(site, "%s of a wgmma changed after pin_registers%s", what, place(pin.site).c_str());
  }
  fault(site, "%s of a wgmma never went through pin_registers", what);
}

void take_accumulators(WgmmaOp& op, WgmmaCall const& call, std::uint32_t seq, Site site) {
  int const count = call.columns / 2;
  int const thread = self->index % kWarpgroup;
  auto found = std::find_if(self->accumulators.begin(), self->accumulators.end(), [&](auto const& a) { return a.d == call.d; });
  if (found != self->accumulators.end()) {
    if (found->count != count) { fault(site, "accumulators of %d registers are in flight as %d", count, found->count); }
    if (!is_poison(call.d, count)) { fault(site, "accumulators were written before pin_registers showed the result of an earlier wgmma"); }
    found->last_seq = seq;
  } else {
    if (call.accumulate) { check_pinned(reinterpret_cast<std::uint32_t const*>(call.d), count, "accumulators", site); }
    if (op.tile == nullptr) {
      op.tile = std::make_shared<AccumulatorTile>();
      op.tile->columns = call.columns;
    }
    for (int i = 0; call.accumulate && i < count; ++i) {
      op.tile->values[row_of(thread, i) * call.columns + column_of(thread, i)] = call.d[i];
    }
    for (int i = 0; i < count; ++i) { std::memcpy(call.d + i, &kAccumulatorPoison, sizeof kAccumulatorPoison); }
    self->accumulators.push_back({call.d, count, seq, op.tile});
    found = self->accumulators.end() - 1;
  }
  if (op.tile == nullptr) { op.tile = found->tile; }
  if (op.tile != found->tile) {
    fault(site, "threads of one warpgroup accumulate into different arrays, the other%s", place(op.site).c_str());
  }
}

// A from registers: PTX ISA, "Register fragments for wgmma.mma_async", matrix A.
void take_a(WgmmaOp& op, WgmmaCall const& call, std::uint32_t seq, Site site) {
  check_pinned(call.a, 4, "A registers", site);
  int const thread = self->index % kWarpgroup;
  OperandInFlight operand{call.a, {}, seq, site};
  for (int i = 0; i < 4; ++i) {
    operand.words[i] = call.a[i];
    float* const row = op.a[row_of(thread, 2 * (i & 1))];
    int const bits = 8 * element_bytes(call.element);
    int const each = 32 / bits;  // neighbouring k in a register
    for (int j = 0; j < each; ++j) {
      row[i / 2 * call.depth() / 2 + thread % 4 * each + j] = element_value(call.element, call.a[i] >> j * bits & ((1u << bits) - 1));
    }
  }
  self->operands.push_back(operand);
}

void check_operands_kept(std::uint32_t waited, Site site) {
  auto& operands = self->operands;
  std::size_t kept = 0;
  for (OperandInFlight const& operand : operands) {
    if (!std::equal(operand.words.begin(), operand.words.end(), operand.a)) {
      fault(site, "A registers of a wgmma in flight%s were overwritten before the wait", place(operand.site).c_str());
    }
    if (operand.seq > waited) { operands[kept++] = operand; }
  }
  operands.resize(kept);
}

// This thread is done with every product up to `waited`.
void finish_ops(Warpgroup& group, std::uint32_t from, std::uint32_t waited, Site site) {
  for (std::uint32_t seq = from; seq <= waited; ++seq) {
    WgmmaOp& op = *group.op(seq);
    if (!op.rechecked && !operands_are_unchanged(op)) {
      fault(site, "shared memory that a wgmma%s reads was written before the wait", place(op.site).c_str());
    }
    op.rechecked = true;
    ++op.finished;
  }
  while (!group.ops.empty() && group.ops.front()->finished == kWarpgroup) {
    group.spare.push_back(std::move(group.ops.front()));
    group.spare.back()->tile = nullptr;
    group.ops.pop_front();
    ++group.first;
  }
}

}  // namespace

void wgmma(WgmmaCall const& call, Site site) {
  if (self->needs_fence) { fault(site, "wgmma without a wgmma_fence since the latest wgmma_wait (or the kernel's start)"); }
  Warpgroup& group = cta->warpgroup[self->warpgroup()];
  std::uint32_t const seq = ++self->issued;
  WgmmaOp* op = group.op(seq);
  if (op == nullptr) {
    op = &new_op(group, call, seq, site);
  } else {
    check_same(*op, call, site);
  }
  check_needs(*op, site);
  take_accumulators(*op, call, seq, site);
  if (call.a != nullptr) { take_a(*op, call, seq, site); }
  if (++op->issued < kWarpgroup) { return; }
  compute(*op);
  for (int i = 0; i < kWarpgroup; ++i) {
    Thread& thread = *cta->thread[self->warpgroup() * kWarpgroup + i];
    if (thread.wait.kind == WaitKind::kWgmma && thread.wait.detail <= seq) { wake(thread); }
  }
}

void wgmma_fence(Site) {
  self->needs_fence = false;
  for (Pin& pin : self->pins) { pin.fenced = true; }
}

void wgmma_commit(Site site) {
  self->groups.push_back(self->issued);
  let_others_run(site);
}

void wgmma_wait(int pending, Site site) {
  auto& groups = self->groups;
  let_others_run(site);
  self->needs_fence = true;
  if (groups.size() <= static_cast<std::size_t>(pending)) { return; }
  std::size_t const ended = groups.size() - pending;
  std::uint32_t const target = groups[ended - 1];
  Warpgroup& group = cta->warpgroup[self->warpgroup()];
  if (target != 0 && !group.is_issued_by_all(target)) { block(WaitKind::kWgmma, 0, target, site); }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(ended));
  if (target <= self->waited) { return; }
  check_operands_kept(target, site);
  finish_ops(group, self->waited + 1, target, site);
  self->waited = target;
  self->clock.at[cta->wgmma_entry(self->warp())] = target;
}

void pin_registers(std::uint32_t* words, int count, Site site) {
  auto& accumulators = self->accumulators;
  auto const found =
      std::find_if(accumulators.begin(), accumulators.end(), [&](auto const& a) { return static_cast<void*>(a.d) == words; });
  if (found != accumulators.end() && found->last_seq <= self->waited) {
    if (!is_poison(found->d, found->count)) {
      fault(site, "accumulators were written between the issue of a wgmma and pin_registers after its wait");
    }
    int const thread = self->index % kWarpgroup;
    for (int i = 0; i < found->count; ++i) {
      found->d[i] = found->tile->values[row_of(thread, i) * found->tile->columns + column_of(thread, i)];
    }
    accumulators.erase(found);
  }
  auto pin = std::find_if(self->pins.begin(), self->pins.end(), [&](Pin const& p) { return p.words == words; });
  if (pin == self->pins.end()) {
    self->pins.push_back({words, {}, false, site});
    pin = self->pins.end() - 1;
  }
  pin->content.assign(words, words + count);
  pin->fenced = false;
  pin->site = site;
}

void check_wgmma_at_end() {
  if (self->issued != self->waited) {
    fault(self->last, "a thread ends while %u of its wgmmas are in flight (no wgmma_commit and wgmma_wait after them)",
          self->issued - self->waited);
  }
}

}  // namespace cutlass_fa::executor
