// SPDX-License-Identifier: BSD-3-Clause
// The box that one TMA copy moves: its rows in global memory and their places in shared memory.
#pragma once

#include "machine.hpp"

namespace cutlass_fa::executor {

// Faults where the argument is no tensor map.
TensorMapFields decode_tensor_map(void const* map, Site site);

inline std::uint32_t box_bytes(TensorMapFields const& map) {
  std::uint32_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) { bytes *= map.box[d]; }
  return bytes;
}

// Where the 16 bytes lie that would be at this offset without swizzle; the hardware swizzles addresses, not offsets.
inline std::uint32_t swizzled_offset(TensorMapFields const& map, std::uint32_t offset) {
  std::uint32_t const at = kSharedBase + offset;
  return (map.swizzle_bytes == 0 ? at : at ^ (at >> 3 & (map.swizzle_bytes - kGranule))) - kSharedBase;
}

// Calls body(address of column 0, whether the row is inside the tensor, offset in the box without swizzle) for each row along dimension 0.
template <class Body>
void for_each_row(TensorMapFields const& map, int const* coordinates, Body body) {
  std::uint32_t const row_bytes = map.box[0] * map.element_bytes;
  std::array<int, 5> position{};  // within the box, dimensions 1 and up
  for (std::uint32_t linear = 0; linear < box_bytes(map); linear += row_bytes) {
    std::uint64_t address = map.base;
    bool exists = true;
    for (int d = 1; d < map.rank; ++d) {
      std::int64_t const coordinate = static_cast<std::int64_t>(coordinates[d]) + position[d];
      exists = exists && coordinate >= 0 && coordinate < map.extents[d];
      address += coordinate * map.strides[d - 1];
    }
    body(address, exists, linear);
    for (int d = 1; d < map.rank && ++position[d] == map.box[d]; ++d) { position[d] = 0; }
  }
}

}  // namespace cutlass_fa::executor
