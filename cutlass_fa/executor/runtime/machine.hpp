// SPDX-License-Identifier: BSD-3-Clause
// The state of one CTA: threads, barriers, copies in flight, matrix products in flight, and what is known about every 16 bytes of shared
// memory. CTAs run one after another, so there is one of these at a time (`cta`), and one thread that runs (`self`).
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include <cutlass_fa_executor/door.hpp>

#include "fiber.hpp"

namespace cutlass_fa::executor {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxWarpgroups = kMaxThreads / kWarpgroup;
constexpr int kMaxMbarriers = 64;
constexpr int kNamedBarriers = 15;  // the hardware's sixteenth is __syncthreads'
constexpr std::uint32_t kSharedBase = 1024;  // the shared window's first KB belongs to the system on sm_90
constexpr int kGranule = 16;  // bytes; no copy and no matrix operand starts or ends inside one

// A vector clock: what a thread knows to be over. Entry w: how many wgmmas of warp w (its `seq`). Entry kMaxWarps + b: 1 when mbarrier b
// is initialised, plus its phases that have ended. Synchronisation merges clocks; whatever an act needs to be over must be in its
// thread's clock, so that a missing barrier shows on every schedule, not only on the unlucky one.
struct Clock {
  std::array<std::uint32_t, kMaxWarps + kMaxMbarriers> at{};

  void merge(Clock const& other) {
    for (std::size_t i = 0; i < at.size(); ++i) { at[i] = other.at[i] > at[i] ? other.at[i] : at[i]; }
  }
};

enum class WaitKind { kNone, kBlockSync, kNamedBarrier, kMbarrier, kWarp, kRegisters, kWgmma };

// What a blocked thread waits for.
struct Wait {
  WaitKind kind = WaitKind::kNone;
  int id = 0;                // barrier, or registers asked for
  std::uint32_t detail = 0;  // parity, or the wgmma's sequence number
  Site site;
};

// ---- matrix products ---------------------------------------------------------------------------------------------------------------

// D of one warpgroup while products on it are in flight: row-major [64][columns].
struct AccumulatorTile {
  int columns = 0;
  std::array<float, 64 * 256> values;
};

// One wgmma of a warpgroup; threads join one after another.
struct WgmmaOp {
  struct Read {
    std::uint32_t offset;  // of 16 bytes in shared memory
    std::array<unsigned char, kGranule> bytes;
  };
  WgmmaCall call{};
  Site site;
  int issued = 0;    // threads
  int finished = 0;  // threads that have waited for it
  bool rechecked = false;
  std::shared_ptr<AccumulatorTile> tile;
  std::vector<std::pair<int, std::uint32_t>> needs;  // (clock entry, least value) of the copies it reads
  std::vector<std::pair<int, std::uint32_t>> origin;  // the same index: (copy, offset) for the report
  std::vector<Read> reads;
  float a[64][16];
  float b[16][256];
};

struct Warpgroup {
  Warpgroup() = default;
  Warpgroup(Warpgroup&&) = default;

  std::deque<std::unique_ptr<WgmmaOp>> ops;
  std::vector<std::unique_ptr<WgmmaOp>> spare;
  std::uint32_t first = 1;  // sequence number of ops.front()

  WgmmaOp* op(std::uint32_t seq) { return seq - first < ops.size() ? ops[seq - first].get() : nullptr; }
  bool is_issued_by_all(std::uint32_t seq) { return seq < first || (op(seq) != nullptr && op(seq)->issued == kWarpgroup); }
};

// A thread's accumulators between the issue of a product and the pin that shows its result.
struct AccumulatorsInFlight {
  float* d;
  int count;
  std::uint32_t last_seq;
  std::shared_ptr<AccumulatorTile> tile;
};

struct OperandInFlight {
  std::uint32_t const* a;
  std::array<std::uint32_t, 4> words;
  std::uint32_t seq;
  Site site;
};

// What an array held when it was last pinned.
struct Pin {
  std::uint32_t const* words;
  std::vector<std::uint32_t> content;
  bool fenced;
  Site site;
};

// ---- threads -----------------------------------------------------------------------------------------------------------------------

struct Thread {
  int index = 0;
  bool finished = false;
  Wait wait;
  Site last;  // its latest act
  Clock clock;
  Fiber fiber;
  std::uint32_t shuffled = 0;  // result of the shuffle it waited for
  std::size_t register_moves = 0;

  bool needs_fence = true;      // registers may have been touched since the latest wgmma_fence
  std::uint32_t issued = 0;     // wgmmas
  std::uint32_t waited = 0;     // of those, how many are known to be over
  std::vector<std::uint32_t> groups;  // `issued` at each commit that is not waited for yet
  std::vector<AccumulatorsInFlight> accumulators;
  std::vector<OperandInFlight> operands;
  std::vector<Pin> pins;

  int warp() const { return index / kWarp; }
  int warpgroup() const { return index / kWarpgroup; }
};

// What the lanes of a warp do together; they come one after another.
struct WarpAct {
  int count = 0;
  Exchange kind{};
  Site site;
  std::array<std::uint32_t, kWarp> value;
  std::array<int, kWarp> operand;
  Clock clock;
};

struct RegisterMove {
  bool grows;
  int registers;
  bool granted;
  int lanes;
  Site site;
};

struct Warp {
  WarpAct act;
  int registers = 0;
  std::vector<RegisterMove> moves;
};

// ---- barriers and copies -----------------------------------------------------------------------------------------------------------

// A hardware barrier; number 0 .. kNamedBarriers - 1 are the named ones, the last is __syncthreads.
struct NamedBarrier {
  int expected = 0;
  int count = 0;
  std::bitset<kMaxThreads> present;
  Clock clock;
  Site site;
};

struct MbarrierState {
  std::uint32_t offset = 0;
  std::uint32_t arrivals = 0;
  std::uint32_t pending = 0;
  std::int64_t bytes = 0;    // expected and not landed yet
  std::uint32_t phase = 0;   // phases ended
  bool fenced = false;
  int initialiser = 0;
  Clock arriving;  // clocks of those who arrived in this phase
  Clock released;  // of all ended phases
  Site site;
};

struct Copy {
  Site site;
  int barrier = 0;
  std::uint32_t phase = 0;  // of the barrier when it was issued
  bool landed = false;
  std::uint32_t offset = 0;
  std::uint32_t bytes = 0;
  std::uint64_t due = 0;  // scheduler step
  TensorMapFields map{};
  std::array<int, 5> coordinates{};
};

struct Granule {
  std::uint32_t copy = 0;  // 1 + index of the copy that wrote it last, 0: none
  std::array<std::uint32_t, kMaxWarpgroups> read_by{};  // the latest wgmma of each warpgroup that reads it
};

// ---- the CTA -----------------------------------------------------------------------------------------------------------------------

struct Cta {
  int index = 0;
  int threads = 0;
  int live = 0;
  int free_registers = 0;
  std::vector<std::unique_ptr<Thread>> thread;
  std::vector<Warp> warp;
  std::vector<Warpgroup> warpgroup;
  std::array<NamedBarrier, kNamedBarriers + 1> barrier;
  std::vector<MbarrierState> mbarrier;
  std::vector<Copy> copies;
  std::vector<int> pending_copies;
  char* shared = nullptr;
  std::uint32_t shared_bytes = 0;
  std::vector<char> published;  // shared memory as asynchronous readers see it: copies, and plain writes up to the latest proxy fence
  std::vector<Granule> granule;
  std::array<std::uint32_t, kMaxWarps> runnable{};  // a bit for each lane
};

extern Cta cta;
extern Thread* self;

// ---- scheduler.cpp -----------------------------------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next();
  std::uint32_t below(std::uint32_t stop) { return static_cast<std::uint32_t>((next() >> 32) * stop >> 32); }

 private:
  std::uint64_t state_;
};
extern Random hostility;

void seed_hostility(std::uint64_t seed);
void run_cta(void (*kernel)());
void block(WaitKind kind, int id, std::uint32_t detail, Site site);  // until someone wakes this thread
void wake(Thread& thread);
void let_others_run(Site site);  // perhaps
std::uint64_t landing_step();    // when a copy issued now is due

// ---- barriers.cpp, copies.cpp, wgmma.cpp, registers.cpp ------------------------------------------------------------------------------

void land(int copy);
void complete_bytes(int barrier, std::uint32_t bytes, Site site);
int find_mbarrier(std::uint64_t const* state, Site site);
void check_wgmma_at_end();
void check_registers_at_end();
void check_cta_end();
void reset_registers();

// ---- fault.cpp ---------------------------------------------------------------------------------------------------------------------

[[noreturn]] void fault(Site site, char const* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void report_deadlock();
std::string place(Site site);
std::string region(std::uint32_t offset, std::uint32_t bytes);

// ---- main.cpp ----------------------------------------------------------------------------------------------------------------------

// Whether [address, address + bytes) lies in one of the launch's global buffers; otherwise `nearest` names the closest.
bool is_global(std::uint64_t address, std::uint64_t bytes, std::string& nearest);

}  // namespace cutlass_fa::executor
