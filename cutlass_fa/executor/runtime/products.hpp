// SPDX-License-Identifier: BSD-3-Clause
// Matrix products of warpgroups, in flight or waiting for some of their threads, and what the threads hold for them.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include <cutlass_fa_executor/door.hpp>

#include "clock.hpp"

namespace cutlass_fa::executor {

constexpr int kGranule = 16;  // bytes; no copy and no matrix operand starts or ends inside one

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
  std::vector<std::uint32_t> granules;  // of 16 bytes that cp.async or stmatrix wrote
  std::vector<Read> reads;
  float a[64][32];
  float b[32][256];
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

}  // namespace cutlass_fa::executor
