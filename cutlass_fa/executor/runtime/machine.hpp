// SPDX-License-Identifier: BSD-3-Clause
// The state of a CTA: threads, barriers, copies in flight, matrix products in flight, and what is known about every 16 bytes of shared
// memory. The CTAs of a cluster run together, clusters one after another. One thread runs at a time (`self`); `cta` is the CTA whose
// shared memory and barriers an act is about: that thread's own, except inside a scope of Within.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <deque>
#include <memory>
#include <queue>
#include <string>
#include <vector>

#include <cutlass_fa_executor/door.hpp>

#include "clock.hpp"
#include "fiber.hpp"
#include "products.hpp"

namespace cutlass_fa::executor {

constexpr unsigned char kPoison = 0xFF;        // of shared memory: NaN in every floating-point format
constexpr std::uint32_t kSharedBase = 1024;  // the shared window's first KB belongs to the system on sm_90

enum class WaitKind { kNone, kBlockSync, kNamedBarrier, kMbarrier, kWarp, kRegisters, kWgmma, kCluster };

// What a blocked thread waits for.
struct Wait {
  WaitKind kind = WaitKind::kNone;
  int id = 0;                // barrier, or registers asked for
  std::uint32_t detail = 0;  // parity, or the wgmma's sequence number
  Site site;
};

// ---- asynchronous acts of single threads -------------------------------------------------------------------------------------------

// A cp.async of 16 bytes.
struct AsyncCopy {
  Site site;
  std::uint32_t offset;
  std::uint64_t source;
  int bytes;
  bool landed;
};

// An arrival at an mbarrier that follows a thread's cp.asyncs by itself.
struct AsyncArrival {
  Site site;
  int barrier;
  int thread;         // of the CTA
  std::uint32_t seq;  // the thread's copies up to this one
  std::uint64_t due;  // scheduler step
};

// A TMA store or reduction.
struct AsyncStore {
  char const* name;  // of the act
  Site site;
  std::uint32_t offset;
  TensorMapFields map;
  std::array<int, 5> coordinates;
  bool adds;
  bool landed;
  std::vector<char> content;  // of its source when it was issued
};

// One thread's acts in order, numbered from 1; those known to be over are gone.
template <class Act>
struct AsyncQueue {
  std::deque<Act> acts;
  std::uint32_t issued = 0;
  std::vector<std::uint32_t> groups;  // `issued` at each commit

  std::uint32_t first() const { return issued + 1 - static_cast<std::uint32_t>(acts.size()); }
  Act* find(std::uint32_t seq) { return seq - first() < acts.size() ? &acts[seq - first()] : nullptr; }

  // The last act of the groups that are over when only the latest `pending` are not.
  std::uint32_t last_over(int pending) const {
    return groups.size() > static_cast<std::size_t>(pending) ? groups[groups.size() - 1 - pending] : 0;
  }
};

// When an act lands at the latest; before that, its thread's wait may do it.
struct Due {
  std::uint64_t step;
  int thread;  // of the CTA
  std::uint32_t seq;
  bool is_store;

  bool operator<(Due const& other) const { return step > other.step; }  // std::priority_queue gives the greatest
};

// ---- threads -----------------------------------------------------------------------------------------------------------------------

struct Cta;

struct Thread {
  Cta* cta = nullptr;
  int index = 0;
  int cluster_index = 0;  // among the threads of the cluster, CTA after CTA
  bool finished = false;
  Wait wait;
  Site last;  // its latest act
  Clock clock;
  std::uint32_t epoch = 0;  // grows whenever others may learn what it has done; its clock holds the present one
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

  AsyncQueue<AsyncCopy> copies;
  AsyncQueue<AsyncStore> stores;
  std::uint32_t stores_read = 0;  // how many of them are known to have read their source
  std::uint32_t copies_handed_over = 0;  // to an mbarrier (cp_async_mbarrier_arrive)

  std::uint32_t remote_acts = 0;  // on the shared memory of other CTAs
  std::uint32_t cluster_phase = 0;  // how many times it has gone through the cluster's barrier
  bool is_at_cluster_barrier = false;  // has arrived, and not waited

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
  std::array<void*, kWarp> record;
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
  std::uint32_t accesses = 0;  // ldmatrix and stmatrix
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
  bool is_unpublished = false;  // plain stores, cp.async or stmatrix changed it, and no fence_async_proxy has followed
  std::uint32_t copy = 0;       // 1 + index of the copy that wrote it last, 0: none
  std::array<std::uint32_t, kMaxWarpgroups> read_by{};  // the latest wgmma of each warpgroup that reads it
};

// Who else touched a granule last: cp.async, TMA stores, ldmatrix, stmatrix. A number of 0 means nobody.
struct Access {
  int copier = 0;  // thread
  std::uint32_t copy = 0;
  int storer = 0;  // thread whose TMA store reads it
  std::uint32_t store = 0;
  int writer = 0;  // warp
  std::uint32_t write = 0;
  std::array<std::uint32_t, kMaxWarps> read_by{};
  Site site;  // of the copy or the write
};

// Plain loads and stores of a granule, told apart two bytes at a time.
struct PlainAccess {
  static constexpr int kUnitBytes = 2;
  static constexpr int kUnits = kGranule / kUnitBytes;
  struct Store {
    int thread = -1;  // of the cluster; -1: nobody
    std::uint32_t epoch = 0;
    bool is_atomic = false;
  };
  std::array<Store, kUnits> store;
  std::array<std::vector<std::uint32_t>, kUnits> load;  // since the store: the latest epoch of each thread of the cluster, 0: none
};

// ---- the CTA and its cluster ---------------------------------------------------------------------------------------------------------

// The latest act of a thread of another CTA on this one's shared memory.
struct RemoteAct {
  std::uint32_t seq = 0;
  char const* name = "";
  Site site;
};

struct Cta {
  int index = 0;
  int rank = 0;  // in its cluster
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
  std::vector<Access> access;  // by granule; empty until the first such act
  std::vector<std::unique_ptr<PlainAccess>> plain;  // by granule; null until the first
  std::vector<std::uint32_t> unpublished;           // granules
  std::priority_queue<Due> due;
  std::vector<AsyncArrival> pending_arrivals;
  std::vector<RemoteAct> touched_by;  // by thread of the cluster; empty until the first
  Clock at_end;                       // what its threads that have ended knew
  std::array<std::uint32_t, kMaxWarps> runnable{};  // a bit for each lane

  std::size_t wgmma_entry(int warp) const { return static_cast<std::size_t>(rank * kCtaEntries + warp); }
  std::size_t mbarrier_entry(int id) const { return static_cast<std::size_t>(rank * kCtaEntries + kMaxWarps + id); }
  std::size_t access_entry(int warp) const { return static_cast<std::size_t>(rank * kCtaEntries + kFirstAccess + warp); }
};

// The CTAs of a cluster, by rank, and their common barrier. A kernel without clusters has clusters of one.
struct Cluster {
  std::vector<std::unique_ptr<Cta>> cta;
  int live = 0;      // threads
  int arrived = 0;   // of them, at the barrier
  std::uint32_t phase = 0;
  Clock arriving, released;

  int size() const { return static_cast<int>(cta.size()); }
};

extern Cluster cluster;
extern Cta* cta;
extern Thread* self;

// For as long as this lives, `cta` is another CTA of the cluster. Nothing in its scope may let other threads run.
class Within {
 public:
  explicit Within(Cta& other) : before_(cta) { cta = &other; }
  ~Within() { cta = before_; }
  Within(Within const&) = delete;
  Within& operator=(Within const&) = delete;

 private:
  Cta* before_;
};

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
void run_cluster(void (*kernel)());
void block(WaitKind kind, int id, std::uint32_t detail, Site site);  // until someone wakes this thread
void wake(Thread& thread);
void let_others_run(Site site);  // perhaps
std::uint64_t landing_step();    // when a copy issued now is due

// ---- warps.cpp ----------------------------------------------------------------------------------------------------------------------

// Each lane of a warp hands in a record; the last to come acts on all of them before any goes on.
void meet(void* record, void (*act)(std::array<void*, kWarp> const& records), Site site);

// Others may now learn what this thread knows: its later plain loads and stores are not part of that.
inline void begin_epoch() { self->clock.plain[static_cast<std::size_t>(self->cluster_index)] = ++self->epoch; }

inline void release_into(Clock& clock) {
  clock.merge(self->clock);
  begin_epoch();
}

// ---- plain.cpp ---------------------------------------------------------------------------------------------------------------------

// Faults unless the plain stores to a granule (where the act `overwrites` it, the plain loads too) are over as far as `known` tells. An
// act that overwrites makes them forgotten.
void check_plain(Clock const& known, char const* act, std::uint32_t granule, bool overwrites, Site site);

// What a fault that has no Site was called from: a plain load or store. 0 where there is none.
std::uintptr_t plain_access_pc();

// Asynchronous readers shall not see the granule before a fence_async_proxy.
void mark_unpublished(std::uint32_t granule);

// ---- granules.cpp ------------------------------------------------------------------------------------------------------------------

Access& access_to(std::uint32_t granule);
bool knows(std::vector<std::uint32_t> const& clock, int thread, std::uint32_t seq);  // of that thread's acts

// Faults unless what wrote the 16 bytes at `offset` asynchronously or for a whole warp is over as far as `known` tells.
void check_copied(Clock const& known, char const* act, std::uint32_t offset, Site site);

// The same, and plain stores.
void check_landed(Clock const& known, char const* act, std::uint32_t offset, Site site);

// Faults on 16 bytes that hold what shared memory starts with.
void check_written(char const* act, std::uint32_t offset, Site site);

// Faults unless everything asynchronous that still needs the granule's old bytes is over as far as `known` tells. what: of the report.
void check_unused(Clock const& known, char const* act, std::uint32_t granule, std::string const& what, Site site);

// Faults unless everything that still needs the old bytes of [offset, offset + bytes) is over as far as `known` tells, and forgets it.
void check_overwrite(Clock const& known, char const* act, std::uint32_t offset, std::uint32_t bytes, Site site);

// Where `bytes` at `pointer` lie in shared memory; a fault outside it or where they are not aligned.
std::uint32_t shared_offset(char const* act, void const* pointer, std::uint32_t bytes, std::uint32_t alignment, Site site);

// ---- cp_async.cpp, tma_store.cpp ---------------------------------------------------------------------------------------------------

void land_async_copy(Thread& thread, std::uint32_t seq);
void land_async_arrival(AsyncArrival const& arrival);
void land_store(Thread& thread, std::uint32_t seq);
void check_async_at_end();  // of a thread
void land_stores_at_end();  // of the CTA

// ---- clusters.cpp ------------------------------------------------------------------------------------------------------------------

// Another CTA of the cluster, whose shared memory this thread is about to touch: it must have started as far as this thread knows, and
// not have ended.
Cta& other_cta(char const* act, int rank, Site site);
void leave_cluster_barrier();  // a thread ends
void check_cluster_at_end();   // of the CTA: nobody may still touch its shared memory

// ---- barriers.cpp, copies.cpp, wgmma.cpp, registers.cpp ------------------------------------------------------------------------------

void land(int copy);
void check_copies_at_end();  // of the CTA
void complete_bytes(int barrier, std::uint32_t bytes, Site site);
int find_mbarrier(std::uint64_t const* state, Site site);
void arrive_at_mbarrier(int barrier, Clock const& clock, Site site);
void check_wgmma_at_end();
void check_registers_at_end();
void reset_registers();

// ---- fault.cpp ---------------------------------------------------------------------------------------------------------------------

[[noreturn]] void fault(Site site, char const* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void report_deadlock();
std::string place(Site site);
std::string region(std::uint32_t offset, std::uint32_t bytes);  // of `cta`

// ---- main.cpp ----------------------------------------------------------------------------------------------------------------------

// Whether [address, address + bytes) lies in one of the launch's global buffers; otherwise `nearest` names the closest.
bool is_global(std::uint64_t address, std::uint64_t bytes, std::string& nearest);

}  // namespace cutlass_fa::executor
