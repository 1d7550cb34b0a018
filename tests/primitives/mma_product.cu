// D (64, kColumns) = A B by four warps, in the manner of FlashAttention-2: blocks of 32 k through a ring of two stages filled by cp.async.
// A (64, depth); B K-major (kColumns, depth) or MN-major (depth, kColumns). Depth and rows may be less than the arrays have: the rest is
// filled with zeros. The test replaces the values of the constants.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/cp_async.cuh>
#include <cutlass_fa/ldmatrix.cuh>
#include <cutlass_fa/mma.cuh>
#include <cutlass_fa/shared_memory.cuh>

using namespace cutlass_fa;

using Element = bfloat16;
constexpr int kColumns = 32;
constexpr int kStride = 96;  // elements from one row of an array to the next
constexpr bool kMnMajorB = false;
constexpr bool kPairs = false;  // two matrices for each load of B instead of four
// Faults.
constexpr int kPending = 1;
constexpr bool kSyncLanded = true;
constexpr bool kSyncUsed = true;
constexpr int kShift = 0;  // bytes
constexpr int kSourceShift = 0;
constexpr int kMultipliers = 32;  // lanes
constexpr bool kWaitAtEnd = true;

constexpr int kBlock = 32;
constexpr int kPitch = kBlock * 2 + 16;               // bytes of a row of A or K-major B, padded against bank conflicts
constexpr int kWidePitch = kColumns * 2 + 16;         // of MN-major B
constexpr int kRowsB = kMnMajorB ? kBlock : kColumns;
constexpr int kPitchB = kMnMajorB ? kWidePitch : kPitch;

struct SharedStorage {
  alignas(1024) char a[2][64 * kPitch];
  alignas(16) char b[2][kRowsB * kPitchB];
};

struct Params {
  char const* a;
  char const* b;
  float* d;  // [128 threads][kColumns / 2]
  int rows;  // of A
  int depth;
};

// Rows of `units` times 16 bytes; what lies beyond `rows` rows and `columns` columns is zero.
CUTLASS_FA_DEVICE void load_tile(char* tile, int pitch, int tile_rows, int units, char const* source, int rows, int columns) {
  for (int unit = thread_index(); unit < tile_rows * units; unit += 128) {
    int const row = unit / units;
    int const column = unit % units * 8;
    int const bytes = row < rows ? max(0, min(16, (columns - column) * 2)) : 0;
    cp_async(tile + row * pitch + column * 2 + kShift, source + (row * kStride + column) * 2 + kSourceShift, bytes);
  }
}

CUTLASS_FA_DEVICE void load_block(SharedStorage& shared, Params const& params, int block) {
  int const from = block * kBlock;
  load_tile(shared.a[block % 2], kPitch, 64, kBlock / 8, params.a + from * 2, params.rows, params.depth - from);
  if constexpr (kMnMajorB) {
    load_tile(shared.b[block % 2], kPitchB, kBlock, kColumns / 8, params.b + from * kStride * 2, params.depth - from, kColumns);
  } else {
    load_tile(shared.b[block % 2], kPitchB, kColumns, kBlock / 8, params.b + from * 2, kColumns, params.depth - from);
  }
}

// Two blocks of 8 columns of B, 16 k: words[0], words[1] belong to the first block.
CUTLASS_FA_DEVICE void load_b(uint32_t (&words)[4], char const* tile, int column, int k, int lane) {
  int const matrix = lane / 8;
  if constexpr (kMnMajorB) {
    char const* const row = tile + (k + lane % 8 + matrix % 2 * 8) * kPitchB + (column + matrix / 2 * 8) * 2;
    if constexpr (kPairs) {
      uint32_t pair[2];
      for (int i = 0; i < 2; ++i) {
        load_matrix_x2_transposed(pair, tile + (k + lane % 16) * kPitchB + (column + 8 * i) * 2);
        words[2 * i] = pair[0];
        words[2 * i + 1] = pair[1];
      }
    } else {
      load_matrix_x4_transposed(words, row);
    }
  } else {
    char const* const row = tile + (column + lane % 8 + matrix / 2 * 8) * kPitchB + (k + matrix % 2 * 8) * 2;
    if constexpr (kPairs) {
      uint32_t pair[2];
      for (int i = 0; i < 2; ++i) {
        load_matrix_x2(pair, tile + (column + 8 * i + lane % 8) * kPitchB + (k + matrix % 2 * 8) * 2);
        words[2 * i] = pair[0];
        words[2 * i + 1] = pair[1];
      }
    } else {
      load_matrix_x4(words, row);
    }
  }
}

extern "C" __global__ void __launch_bounds__(128, 1) mma_product(const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  int const lane = thread_index() % 32;
  int const warp_row = thread_index() / 32 * 16;
  float acc[kColumns / 8][4] = {};
  int const blocks = (params.depth + kBlock - 1) / kBlock;
  load_block(shared, params, 0);
  cp_async_commit();
  for (int block = 0; block < blocks; ++block) {
    if (block + 1 < blocks) { load_block(shared, params, block + 1); }
    cp_async_commit();
    cp_async_wait<kPending>();
    if constexpr (kSyncLanded) { block_sync(); }
#pragma unroll
    for (int k = 0; k < kBlock; k += 16) {
      uint32_t a[4];
      load_matrix_x4(a, shared.a[block % 2] + (warp_row + lane % 16) * kPitch + (k + lane / 16 * 8) * 2 + kShift);
#pragma unroll
      for (int column = 0; column < kColumns; column += 16) {
        uint32_t b[4];
        load_b(b, shared.b[block % 2], column, k, lane);
        if (lane < kMultipliers) {
          mma<Element>(acc[column / 8], a, b[0], b[1]);
          mma<Element>(acc[column / 8 + 1], a, b[2], b[3]);
        }
      }
    }
    if constexpr (kSyncUsed) { block_sync(); }
  }
  if constexpr (kWaitAtEnd) { cp_async_wait_all(); }
  for (int i = 0; i < kColumns / 2; ++i) { params.d[thread_index() * (kColumns / 2) + i] = acc[i / 4][i % 4]; }
}
