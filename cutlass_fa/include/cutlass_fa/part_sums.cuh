// SPDX-License-Identifier: BSD-3-Clause
// Partial results of rows of a tile, and their sum.
#pragma once

#include <cutlass_fa/accumulator_rows.cuh>
#include <cutlass_fa/atomic.cuh>
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/math.cuh>
#include <cutlass_fa/named_barrier.cuh>
#include <cutlass_fa/softmax.cuh>
#include <cutlass_fa/warp.cuh>

namespace cutlass_fa {

// One part's rows, of which is_used(row) says which there are: acc_o as it is, what it is measured from, and its sum. place: of row 0 of the
// tile in part_o (places, kSize * 2) and part_rows (places, 2).
template <int kSize, class IsUsed>
CUTLASS_FA_DEVICE void store_part(float const (&acc_o)[kSize], SoftmaxRows const& rows, float* part_o, float* part_rows, int64_t place, int row_in_tile,
                                  IsUsed is_used) {
  constexpr int kColumns = 2 * kSize;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int const row = row_in_tile + 8 * r;
    bool const exists = is_used(row);
    float const sum = quad_sum(rows.sum[r]);
    if (exists && thread_index() % 4 == 0) { *reinterpret_cast<float2*>(part_rows + 2 * (place + row)) = make_float2(rows.origin[r], sum); }
    float* const o_row = part_o + (place + row) * kColumns;
#pragma unroll
    for (int block = 0; block < kColumns / 8; block += 2) {
      float4 const columns = traded_columns(acc_o, block, r, 1.0f);
      if (exists) { *reinterpret_cast<float4*>(o_row + traded_column(block)) = columns; }
    }
  }
}

// Four columns of a row as a part has them: not yet divided by the row's sum, which is measured from `origin` (softmax.cuh).
struct PartSum {
  float origin, sum;
  float4 o;
};

CUTLASS_FA_DEVICE float4 scaled(float4 o, float scale) { return make_float4(o.x * scale, o.y * scale, o.z * scale, o.w * scale); }

CUTLASS_FA_DEVICE PartSum no_parts() { return {negative_infinity(), 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)}; }

// row: origin and sum of the part.
CUTLASS_FA_DEVICE void add_part(PartSum& total, float2 row, float4 o) {
  float const origin = fmaxf(total.origin, row.x);
  float const base = origin == negative_infinity() ? 0.0f : origin;  // -inf - -inf would be NaN
  float const old_weight = exp2_approx(total.origin - base), weight = exp2_approx(row.x - base);
  total.o = make_float4(total.o.x * old_weight + o.x * weight, total.o.y * old_weight + o.y * weight, total.o.z * old_weight + o.z * weight,
                        total.o.w * old_weight + o.w * weight);
  total.sum = total.sum * old_weight + row.y * weight;
  total.origin = origin;
}

// The sum over all parts in their order, so that it does not matter which came last. place_of: part -> place of its row in part_o
// (places, kColumns) and part_rows (places, 2). The loads of several parts are on their way together.
template <int kColumns, class PlaceOf>
CUTLASS_FA_DEVICE PartSum sum_of_parts(float const* part_o, float const* part_rows, int column, int parts, PlaceOf place_of) {
  constexpr int kAtOnce = 8;
  PartSum total = no_parts();
#pragma unroll 1
  for (int first = 0; first < parts; first += kAtOnce) {
    float2 rows[kAtOnce];
    float4 o[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < parts) {
        int64_t const place = place_of(first + i);
        rows[i] = *reinterpret_cast<float2 const*>(part_rows + 2 * place);
        o[i] = *reinterpret_cast<float4 const*>(part_o + place * kColumns + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < parts) { add_part(total, rows[i], o[i]); }
    }
  }
  return total;
}

// Whether this CTA brings the last of a tile's parts, told to the threads that have stored them: `threads`, a multiple of a warp, of which
// thread_index() % threads is 0 in one. counter: parts that are there; 0 before the first and after the last. A CTA that has all parts of a
// tile counts them itself: the counter is of the one tile that a CTA begins and another ends. Named barrier 0 is theirs.
CUTLASS_FA_DEVICE bool is_last_to_arrive(int* counter, int arrivals, int parts, int threads, int& is_last) {
  named_barrier_sync(0, threads);  // with each other: all of them have stored
  if (thread_index() % threads == 0) {
    is_last = arrivals == parts;
    if (!is_last && atomic_add_in_order(counter, arrivals) + arrivals == parts) {
      is_last = true;
      *counter = 0;  // for the next launch: nobody else comes to this tile
    }
  }
  named_barrier_sync(0, threads);  // is_last is there, and the other CTAs' parts are visible where it is true
  return is_last;
}

}  // namespace cutlass_fa
