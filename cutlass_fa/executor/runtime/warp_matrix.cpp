// SPDX-License-Identifier: BSD-3-Clause
// Matrix instructions of one warp: mma.sync, ldmatrix, stmatrix. The lanes meet, the last to come does the work of all.
#include <algorithm>
#include <cstring>

#include "machine.hpp"
#include "operands.hpp"

namespace cutlass_fa::executor {
namespace {

struct Product {
  float* d;
  std::uint32_t const* a;
  std::uint32_t b[2];
  ElementKind element;
  Site site;
};

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
void multiply(std::array<void*, kWarp> const& records) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    Product const& part = *static_cast<Product const*>(records[lane]);
    ElementKind const element = static_cast<Product const*>(records[0])->element;
    if (part.element != element) { fault(part.site, "lanes of one warp multiply different types"); }
    int const group = lane / 4;
    int const pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[group + i % 2 * 8][i / 2 * 8 + pair + half] = element_value(element, part.a[i] >> 16 * half & 0xFFFF);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) { b[i * 8 + pair + half][group] = element_value(element, part.b[i] >> 16 * half & 0xFFFF); }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const d = static_cast<Product const*>(records[lane])->d;
    for (int i = 0; i < 4; ++i) {
      float const* const row = a[lane / 4 + i / 2 * 8];
      int const column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) { d[i] += row[k] * b[k][column]; }
    }
  }
}

struct Transfer {
  std::uint32_t* words;
  int matrices;
  void const* row;
  bool transposed;
  bool stores;
  Site site;
};

char const* name_of(Transfer const& transfer) { return transfer.stores ? "store_matrix" : "load_matrix"; }

// What every lane knows: all of them take part in what any row goes through.
Clock common_clock() {
  int const first = self->index - self->index % kWarp;
  Clock common = cta->thread[first]->clock;
  auto const keep_least = [](std::vector<std::uint32_t>& mine, std::vector<std::uint32_t> const& other) {
    mine.resize(std::min(mine.size(), other.size()));
    for (std::size_t i = 0; i < mine.size(); ++i) { mine[i] = std::min(mine[i], other[i]); }
  };
  for (int lane = 1; lane < kWarp; ++lane) {
    Clock const& other = cta->thread[first + lane]->clock;
    for (std::size_t i = 0; i < common.at.size(); ++i) { common.at[i] = std::min(common.at[i], other.at[i]); }
    keep_least(common.copies, other.copies);
    keep_least(common.stores, other.stores);
    keep_least(common.plain, other.plain);
  }
  return common;
}

// One of the two 16-bit elements of a lane's word, as a place in the warp's matrix: (row, column).
std::pair<int, int> place_of(int lane, int half, bool transposed) {
  int const across = lane / 4;
  int const along = lane % 4 * 2 + half;
  return transposed ? std::pair(along, across) : std::pair(across, along);
}

void transfer_all(std::array<void*, kWarp> const& records) {
  Transfer const& one = *static_cast<Transfer const*>(records[0]);
  Clock const common = common_clock();
  int const warp = self->warp();
  std::uint32_t const access_number = ++cta->warp[warp].accesses;
  std::array<std::uint32_t, kWarp> offset{};
  for (int lane = 0; lane < kWarp; ++lane) {
    Transfer const& mine = *static_cast<Transfer const*>(records[lane]);
    if (mine.matrices != one.matrices || mine.transposed != one.transposed || mine.stores != one.stores) {
      fault(mine.site, "lanes of one warp meet in different matrix instructions");
    }
    if (lane >= 8 * one.matrices) { continue; }
    offset[lane] = shared_offset(name_of(one), mine.row, kGranule, kGranule, mine.site);
    if (one.stores) {
      check_overwrite(common, name_of(one), offset[lane], kGranule, mine.site);
    } else {
      check_landed(common, name_of(one), offset[lane], mine.site);
      check_written(name_of(one), offset[lane], mine.site);
      access_to(offset[lane] / kGranule).read_by[warp] = access_number;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < one.matrices; ++matrix) {
      auto* const word = reinterpret_cast<char*>(static_cast<Transfer const*>(records[lane])->words + matrix);
      for (int half = 0; half < 2; ++half) {
        auto const [row, column] = place_of(lane, half, one.transposed);
        char* const element = cta->shared + offset[8 * matrix + row] + 2 * column;
        one.stores ? std::memcpy(element, word + 2 * half, 2) : std::memcpy(word + 2 * half, element, 2);
      }
    }
    cta->thread[self->index - self->index % kWarp + lane]->clock.at[cta->access_entry(warp)] = access_number;
  }
  for (int lane = 0; one.stores && lane < 8 * one.matrices; ++lane) {
    Access& access = access_to(offset[lane] / kGranule);
    access.writer = warp;
    access.write = access_number;
    access.site = one.site;
    mark_unpublished(offset[lane] / kGranule);
  }
}

}  // namespace

void mma(float* d, std::uint32_t const* a, std::uint32_t b0, std::uint32_t b1, ElementKind element, Site site) {
  Product part{d, a, {b0, b1}, element, site};
  meet(&part, multiply, site);
}

void load_matrix(std::uint32_t* words, int matrices, void const* row, bool transposed, Site site) {
  let_others_run(site);
  Transfer mine{words, matrices, row, transposed, false, site};
  meet(&mine, transfer_all, site);
}

void store_matrix(void* row, std::uint32_t const* words, int matrices, bool transposed, Site site) {
  let_others_run(site);
  Transfer mine{const_cast<std::uint32_t*>(words), matrices, row, transposed, true, site};
  meet(&mine, transfer_all, site);
}

}  // namespace cutlass_fa::executor
