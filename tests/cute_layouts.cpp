// What CuTe's own layouts say about the tiles and fragments of cutlass_fa/layouts.py. A host program; needs no GPU.
//
// Output (stdout, binary, native byte order): records of a header of six 32-bit words (kind, rows, cols, swizzle_bytes,
// extent, count) followed by `count` 32-bit words. tests/test_layouts.py reads them and compares.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

// Shared memory is a host buffer here. CuTe takes the 32-bit address of a descriptor from this intrinsic, which host
// compilers lack; with it defined, make_gmma_desc is whole on the host, start address included.
extern unsigned char shared_memory[];
static std::size_t __cvta_generic_to_shared(void const* pointer) {
  return static_cast<unsigned char const*>(pointer) - shared_memory;
}
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

using namespace cute;
using Element = bfloat16_t;
using GMMA::Major;

constexpr int kStages = 2;
constexpr int kMaxRows = 192, kMaxCols = 256;
alignas(1024) unsigned char shared_memory[kStages * kMaxRows * kMaxCols * sizeof(Element)];

enum Kind : std::int32_t { kPlacementK, kPlacementMN, kDescriptorK, kDescriptorMN, kAccumulator, kOperandA, kMmaAccumulator, kMmaA, kMmaB };

void write_record(Kind kind, int rows, int cols, int swizzle_bytes, int extent,
                  std::vector<std::uint32_t> const& words) {
  std::int32_t const header[6] = {kind, rows, cols, swizzle_bytes, extent, std::int32_t(words.size())};
  std::fwrite(header, sizeof(header), 1, stdout);
  std::fwrite(words.data(), sizeof(words[0]), words.size(), stdout);
}

template <int SwizzleBytes, Major major>
constexpr auto layout_atom() {
  if constexpr (SwizzleBytes == 128) return GMMA::Layout_SW128_Atom<Element, major>{};
  else if constexpr (SwizzleBytes == 64) return GMMA::Layout_SW64_Atom<Element, major>{};
  else if constexpr (SwizzleBytes == 32) return GMMA::Layout_SW32_Atom<Element, major>{};
  else return GMMA::Layout_INTER_Atom<Element, major>{};
}

// A tile in shared memory, indexed (row, col) when K-major and (col, row) when MN-major; stages, if any, come last.
template <int SwizzleBytes, Major major, class Rows, class Cols, class... Stages>
auto make_tile(Rows rows, Cols cols, Stages... stages) {
  auto atom = layout_atom<SwizzleBytes, major>();
  auto pointer = make_smem_ptr(reinterpret_cast<Element*>(shared_memory));
  if constexpr (major == Major::K) {
    return make_tensor(pointer, tile_to_shape(atom, make_shape(rows, cols, stages...)));
  } else if constexpr (sizeof...(Stages) == 0) {
    return make_tensor(pointer, tile_to_shape(atom, make_shape(cols, rows), Step<_2, _1>{}));
  } else {
    return make_tensor(pointer, tile_to_shape(atom, make_shape(cols, rows, stages...), Step<_2, _1, _3>{}));
  }
}

// Byte offset of every element (stage, row, col): the address that CuTe itself would access, so swizzled.
template <int Cols, int SwizzleBytes, Major major>
void write_placement(int rows) {
  auto tile = make_tile<SwizzleBytes, major>(rows, Int<Cols>{}, Int<kStages>{});
  std::vector<std::uint32_t> words;
  for (int stage = 0; stage < kStages; ++stage)
    for (int row = 0; row < rows; ++row)
      for (int col = 0; col < Cols; ++col) {
        Element& element = major == Major::K ? tile(row, col, stage) : tile(col, row, stage);
        words.push_back(reinterpret_cast<unsigned char*>(&element) - shared_memory);
      }
  write_record(major == Major::K ? kPlacementK : kPlacementMN, rows, Cols, SwizzleBytes, 0, words);
}

// Descriptors (low word, high word) of every operand of Extent (M or N) x 16 (K) elements, steps along K outermost.
template <int Rows, int Cols, int SwizzleBytes, int Extent, Major major>
void write_descriptors() {
  // As types: the layouts are static, and functions named only in decltype get no code, which halves the compile time.
  using Tile = decltype(make_tile<SwizzleBytes, major>(Int<Rows>{}, Int<Cols>{}));
  using Blocks = decltype(zipped_divide(std::declval<Tile>(), Shape<Int<Extent>, _16>{}));
  using Operand = decltype(std::declval<Blocks>()(make_coord(_, _), make_coord(0, 0)));
  using BlockOffsets = decltype(layout<1>(typename Blocks::layout_type{}));
  std::vector<std::uint32_t> words;
  for (int block = 0; block < decltype(size(BlockOffsets{}))::value; ++block) {
    Element* pointer = reinterpret_cast<Element*>(shared_memory) + BlockOffsets{}(block);
    Operand const operand{{typename Operand::iterator{pointer}}, {}};
    GmmaDescriptor const descriptor = GMMA::make_gmma_desc<major>(operand);
    words.push_back(descriptor.reg32_[0]);
    words.push_back(descriptor.reg32_[1]);
  }
  write_record(major == Major::K ? kDescriptorK : kDescriptorMN, Rows, Cols, SwizzleBytes, Extent, words);
}

template <int Rows, int Cols, int SwizzleBytes>
void write_tile() {
  write_placement<Cols, SwizzleBytes, Major::K>(Rows);
  write_placement<Cols, SwizzleBytes, Major::MN>(Rows);
  write_descriptors<Rows, Cols, SwizzleBytes, Rows, Major::K>();  // B of Q @ K^T
  if constexpr (Rows == 128 || Rows == 192) {
    write_descriptors<Rows, Cols, SwizzleBytes, 64, Major::K>();  // A of Q @ K^T, 64 rows for each warpgroup
  }
  write_descriptors<Rows, Cols, SwizzleBytes, Cols, Major::MN>();  // B of P @ V
}

template <int Cols, int SwizzleBytes, int... Rows>
void write_tiles(std::integer_sequence<int, Rows...>) {
  (write_tile<Rows, Cols, SwizzleBytes>(), ...);
}

// row + rows * col of the element that each (thread, value) of a warpgroup holds, or of a warp.
template <class ThreadValueLayout>
void write_ownership(Kind kind, int cols, ThreadValueLayout layout, int rows = 64) {
  std::vector<std::uint32_t> words;
  for (int thread = 0; thread < size<0>(layout); ++thread)
    for (int value = 0; value < size<1>(layout); ++value) words.push_back(layout(thread, value));
  write_record(kind, rows, cols, 0, 0, words);
}

template <int... N>
void write_accumulators() {
  (write_ownership(kAccumulator, N, GMMA::CLayout_64xN<N>{}), ...);
}

// The instruction of P @ V has these layouts; the shapes that the base header lacks have the same ones by construction.
using PvTraits = MMA_Traits<SM90_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>>;
static_assert(is_same_v<PvTraits::CLayout, GMMA::CLayout_64xN<128>>);
static_assert(is_same_v<PvTraits::ALayout, GMMA::ALayout_64x16>);

int main() {
  using Rows = std::integer_sequence<int, 64, 80, 96, 112, 128, 144, 160, 176, 192>;
  write_tiles<64, 128>(Rows{});
  write_tiles<128, 128>(Rows{});
  write_tiles<192, 128>(Rows{});
  write_tiles<256, 128>(Rows{});
  write_tiles<96, 64>(Rows{});  // head_dim 96, and 80 padded to whole chunks
  write_tiles<64, 32>(Rows{});
  // Tiles whose keys are contiguous: (column, key).
  using HeadDims = std::integer_sequence<int, 64, 80, 96, 128, 192, 256>;
  write_tiles<128, 0>(HeadDims{});
  write_tiles<64, 0>(HeadDims{});
  write_accumulators<64, 80, 96, 112, 128, 144, 160, 176, 192, 256>();
  write_ownership(kOperandA, 16, GMMA::ALayout_64x16{});
  using MmaTraits = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  write_ownership(kMmaAccumulator, 8, MmaTraits::CLayout{}, 16);
  write_ownership(kMmaA, 16, MmaTraits::ALayout{}, 16);
  write_ownership(kMmaB, 16, MmaTraits::BLayout{}, 8);  // (column of B, k)
}
