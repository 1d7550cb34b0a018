// SPDX-License-Identifier: BSD-3-Clause
// What the 32 lanes of a warp do together: shuffles and votes, and moving registers between warpgroups.
#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

constexpr int kRegistersPerSm = 65536;
constexpr int kMostRegisters = 255;

void grant_waiting() {
  for (std::size_t w = 0; w < cta->warp.size(); ++w) {
    Warp& warp = cta->warp[w];
    if (warp.moves.empty() || warp.moves.back().granted) { continue; }
    RegisterMove& move = warp.moves.back();
    int const more = (move.registers - warp.registers) * kWarp;
    if (more > cta->free_registers) { continue; }
    cta->free_registers -= more;
    warp.registers = move.registers;
    move.granted = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      Thread& thread = *cta->thread[w * kWarp + lane];
      if (thread.wait.kind == WaitKind::kRegisters) { wake(thread); }
    }
  }
}

void move_registers(bool grows, int registers, Site site) {
  if (registers % 8 != 0 || registers < 24 || registers > 256) { fault(site, "setmaxnreg %d: a multiple of 8 from 24 to 256", registers); }
  Warp& warp = cta->warp[self->warp()];
  std::size_t const turn = self->register_moves++;
  if (turn == warp.moves.size()) {
    if (grows ? registers < warp.registers : registers > warp.registers) {
      fault(site, "%s to %d registers from %d", grows ? "growing" : "shrinking", registers, warp.registers);
    }
    if (!grows) {
      cta->free_registers += (warp.registers - registers) * kWarp;
      warp.registers = registers;
    }
    warp.moves.push_back({grows, registers, !grows, 0, site});
    grant_waiting();
  }
  RegisterMove& move = warp.moves[turn];
  if (move.grows != grows || move.registers != registers) {
    fault(site, "lanes of one warp ask for %d and %d registers", move.registers, registers);
  }
  ++move.lanes;
  if (!warp.moves[turn].granted) { block(WaitKind::kRegisters, registers, 0, site); }
}

std::uint32_t exchanged(WarpAct const& act, int lane) {
  if (act.kind == Exchange::kSync) { return 0; }
  if (act.kind == Exchange::kVote) {
    std::uint32_t ballot = 0;
    for (int i = 0; i < kWarp; ++i) { ballot |= static_cast<std::uint32_t>(act.value[i] != 0) << i; }
    return ballot;
  }
  int const from = act.kind == Exchange::kXor ? lane ^ act.operand[lane] : act.operand[lane];
  if (from < 0 || from >= kWarp) { fault(act.site, "lane %d shuffles with lane %d", lane, from); }
  return act.value[from];
}

// This lane comes to what its warp does together.
WarpAct& come(Exchange kind, Site site) {
  WarpAct& act = cta->warp[self->warp()].act;
  if (act.count == 0) {
    act.kind = kind;
    act.site = site;
    act.clock.clear();
  }
  if (act.kind != kind || act.site.line != site.line) {
    fault(site, "lanes of one warp meet in different acts, the other%s", place(act.site).c_str());
  }
  return act;
}

}  // namespace

void reset_registers() {
  int const each = kRegistersPerSm / cta->threads / 8 * 8;
  int const registers = each < kMostRegisters ? each : kMostRegisters / 8 * 8;
  for (Warp& warp : cta->warp) { warp.registers = registers; }
  cta->free_registers = kRegistersPerSm - registers * cta->threads;
}

void shrink_registers(int registers, Site site) {
  move_registers(false, registers, site);
  let_others_run(site);
}

void grow_registers(int registers, Site site) {
  move_registers(true, registers, site);
  let_others_run(site);
}

std::uint32_t exchange(Exchange kind, std::uint32_t value, int operand, Site site) {
  WarpAct& act = come(kind, site);
  int const lane = self->index % kWarp;
  act.value[lane] = value;
  act.operand[lane] = operand;
  if (kind == Exchange::kSync) { release_into(act.clock); }
  if (++act.count < kWarp) {
    block(WaitKind::kWarp, 0, 0, site);
    return self->shuffled;
  }
  act.count = 0;
  int const first = self->index - lane;
  for (int i = 0; i < kWarp; ++i) {
    Thread& thread = *cta->thread[first + i];
    thread.shuffled = exchanged(act, i);
    if (kind == Exchange::kSync) { thread.clock.merge(act.clock); }
    if (i != lane) { wake(thread); }
  }
  return self->shuffled;
}

void meet(void* record, void (*act_on)(std::array<void*, kWarp> const& records), Site site) {
  WarpAct& act = come(Exchange::kRecord, site);
  int const lane = self->index % kWarp;
  act.record[lane] = record;
  if (++act.count < kWarp) { return block(WaitKind::kWarp, 0, 0, site); }
  act.count = 0;
  act_on(act.record);
  for (int i = 0; i < kWarp; ++i) {
    if (i != lane) { wake(*cta->thread[self->index - lane + i]); }
  }
}

// Registers given up must have been taken: where one warpgroup reconfigures, all do, every lane of them.
void check_registers_at_end() {
  bool any = false;
  for (Warp const& warp : cta->warp) { any = any || !warp.moves.empty(); }
  for (std::size_t w = 0; any && w < cta->warp.size(); ++w) {
    if (cta->warp[w].moves.empty()) {
      fault(Site{}, "warp %zu kept its %d registers while others moved theirs (shrink_registers_to, grow_registers_to)", w,
            cta->warp[w].registers);
    }
    for (RegisterMove const& move : cta->warp[w].moves) {
      if (move.lanes != kWarp) { fault(move.site, "%d of 32 lanes of warp %zu moved registers", move.lanes, w); }
    }
  }
}

}  // namespace cutlass_fa::executor
