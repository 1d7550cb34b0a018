// SPDX-License-Identifier: BSD-3-Clause
// Rotary position embedding (Su et al. 2021): pairs of a row's columns are turned by angles that grow with the row's position.
#pragma once

#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>

namespace cutlass_fa {

// How one row is turned. The first `dim` columns are, a multiple of 16 of them.
template <class Element>
struct RotaryRow {
  Element const* cos;  // (dim / 2,) of the row's position
  Element const* sin;
  int dim;
  bool is_interleaved;  // pairs are columns 2i and 2i + 1; else i and i + dim / 2
};

// Eight neighbouring columns that begin at `column`, a multiple of 8, of a pair of halves.
template <class Element>
CUTLASS_FA_DEVICE uint4 turned_halves(RotaryRow<Element> const& rotary, Element const* row, int column) {
  int const half = rotary.dim / 2;
  bool const is_first = column < half;
  int const angle = is_first ? column : column - half;
  uint4 const own = *reinterpret_cast<uint4 const*>(row + column);
  uint4 const other = *reinterpret_cast<uint4 const*>(row + (is_first ? column + half : angle));
  uint4 const cos = *reinterpret_cast<uint4 const*>(rotary.cos + angle), sin = *reinterpret_cast<uint4 const*>(rotary.sin + angle);
  uint32_t const own_words[4] = {own.x, own.y, own.z, own.w}, other_words[4] = {other.x, other.y, other.z, other.w};
  uint32_t const cos_words[4] = {cos.x, cos.y, cos.z, cos.w}, sin_words[4] = {sin.x, sin.y, sin.z, sin.w};
  float const sign = is_first ? -1.0f : 1.0f;
  uint32_t turned[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float2 const a = unpack2<Element>(own_words[word]), b = unpack2<Element>(other_words[word]);
    float2 const c = unpack2<Element>(cos_words[word]), s = unpack2<Element>(sin_words[word]);
    turned[word] = pack2<Element>(a.x * c.x + sign * b.x * s.x, a.y * c.y + sign * b.y * s.y);
  }
  return make_uint4(turned[0], turned[1], turned[2], turned[3]);
}

// The same of four pairs of neighbours.
template <class Element>
CUTLASS_FA_DEVICE uint4 turned_neighbours(RotaryRow<Element> const& rotary, Element const* row, int column) {
  uint4 const own = *reinterpret_cast<uint4 const*>(row + column);
  uint2 const cos = *reinterpret_cast<uint2 const*>(rotary.cos + column / 2), sin = *reinterpret_cast<uint2 const*>(rotary.sin + column / 2);
  uint32_t const own_words[4] = {own.x, own.y, own.z, own.w};
  float2 const cos_pairs[2] = {unpack2<Element>(cos.x), unpack2<Element>(cos.y)};
  float2 const sin_pairs[2] = {unpack2<Element>(sin.x), unpack2<Element>(sin.y)};
  uint32_t turned[4];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float2 const a = unpack2<Element>(own_words[word]), c = cos_pairs[word / 2], s = sin_pairs[word / 2];
    float const cosine = word % 2 ? c.y : c.x, sine = word % 2 ? s.y : s.x;
    turned[word] = pack2<Element>(a.x * cosine - a.y * sine, a.x * sine + a.y * cosine);
  }
  return make_uint4(turned[0], turned[1], turned[2], turned[3]);
}

// Eight neighbouring columns of a row, turned where they are among those that are.
template <class Element>
CUTLASS_FA_DEVICE uint4 turned_columns(RotaryRow<Element> const& rotary, Element const* row, int column) {
  if (column >= rotary.dim) { return *reinterpret_cast<uint4 const*>(row + column); }
  return rotary.is_interleaved ? turned_neighbours(rotary, row, column) : turned_halves(rotary, row, column);
}

}  // namespace cutlass_fa
