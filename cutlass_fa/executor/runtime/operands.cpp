// SPDX-License-Identifier: BSD-3-Clause
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": matrix descriptor format, shared memory matrix layouts, strides.
#include "operands.hpp"

#include <cmath>
#include <cstring>

#include "machine.hpp"

namespace cutlass_fa::executor {
namespace {

// Of 16-bit elements, the only ones that may be MN-major.
constexpr int kUnitElements = kGranule / 2;

struct Descriptor {
  std::uint32_t start, leading, stride, swizzle_bytes;
};

Descriptor decode(std::uint64_t bits, Site site) {
  constexpr std::uint32_t kSwizzles[] = {0, 128, 64, 32};
  if ((bits >> 49 & 7) != 0) {
    fault(site, "matrix descriptor %#llx: base offsets are not used here", static_cast<unsigned long long>(bits));
  }
  auto const field = [&](int shift) { return static_cast<std::uint32_t>(bits >> shift & 0x3FFF) << 4; };
  return {field(0), field(16), field(32), kSwizzles[bits >> 62]};
}

// Address of the unit that holds 16 bytes of consecutive k of row `row` (of M or N), K-major.
std::uint32_t k_major_unit(Descriptor const& d, int row, int unit) {
  if (d.swizzle_bytes == 0) { return d.start + row / 8 * d.stride + row % 8 * kGranule + unit * d.leading; }
  return d.start + row / 8 * d.stride + row % 8 * d.swizzle_bytes + unit * kGranule;
}

// Address of the unit that holds 8 consecutive rows (of M or N) from 8 * unit on, at one k, MN-major.
std::uint32_t mn_major_unit(Descriptor const& d, int k, int unit) {
  if (d.swizzle_bytes == 0) { return d.start + unit * d.stride + k / 8 * d.leading + k % 8 * kGranule; }
  int const units = static_cast<int>(d.swizzle_bytes) / kGranule;
  return d.start + unit / units * d.leading + k / 8 * d.stride + k % 8 * d.swizzle_bytes + unit % units * kGranule;
}

std::uint32_t swizzled(Descriptor const& d, std::uint32_t address) {
  return d.swizzle_bytes == 0 ? address : address ^ (address >> 3 & (d.swizzle_bytes - kGranule));
}

// E4M3 has no infinities, and one NaN of either sign (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
std::array<float, 256> make_e4m3_values() {
  std::array<float, 256> values;
  for (int bits = 0; bits < 256; ++bits) {
    int const exponent = bits >> 3 & 15;
    int const mantissa = bits & 7;
    auto const scaled = [](int number, int power) { return std::ldexp(static_cast<float>(number), power); };
    float const size = exponent == 0 ? scaled(mantissa, -9) : scaled(8 + mantissa, exponent - 10);
    values[bits] = std::copysign((bits & 0x7F) == 0x7F ? NAN : size, (bits & 0x80) != 0 ? -1.0f : 1.0f);
  }
  return values;
}
std::array<float, 256> const kE4m3Values = make_e4m3_values();

class Reader {
 public:
  Reader(WgmmaOp& op, int warpgroup, std::uint32_t seq) : op_(op), warpgroup_(warpgroup), seq_(seq) {}

  void unit(Descriptor const& d, std::uint32_t address, ElementKind element, char const* operand, float* out, int pitch) {
    std::uint32_t const at = swizzled(d, address);
    if (at < kSharedBase || at + kGranule > kSharedBase + cta->shared_bytes) {
      fault(op_.site, "wgmma reads operand %s at shared byte %d: shared memory has %u", operand,
            static_cast<int>(at) - static_cast<int>(kSharedBase), cta->shared_bytes);
    }
    std::uint32_t const offset = at - kSharedBase;
    WgmmaOp::Read read{offset, {}};
    std::memcpy(read.bytes.data(), cta->shared + offset, kGranule);
    check(offset, read.bytes, operand);
    int const bytes = element_bytes(element);
    for (int i = 0; i < kGranule / bytes; ++i) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, read.bytes.data() + bytes * i, static_cast<std::size_t>(bytes));
      out[i * pitch] = element_value(element, bits);
    }
    op_.reads.push_back(read);
  }

 private:
  void check(std::uint32_t offset, std::array<unsigned char, kGranule> const& bytes, char const* operand) {
    Granule& granule = cta->granule[offset / kGranule];
    granule.read_by[warpgroup_] = seq_;
    bool const is_copied = !cta->access.empty() && (cta->access[offset / kGranule].copy | cta->access[offset / kGranule].write) != 0;
    bool const is_plain = !cta->plain.empty() && cta->plain[offset / kGranule] != nullptr;
    if (is_copied || is_plain) { op_.granules.push_back(offset); }
    if (std::memcmp(bytes.data(), cta->published.data() + offset, kGranule) != 0) {
      fault(op_.site, "wgmma reads operand %s at %s, written by plain stores that no fence_async_proxy has followed", operand,
            region(offset, kGranule).c_str());
    }
    if (granule.copy == 0) {
      // Rows of A may not exist (a tile that is not full): they are NaN and stay in their own rows of D. Every row of B reaches all of D.
      bool poison = *operand == 'B';
      for (unsigned char const byte : bytes) { poison = poison && byte == kPoison; }
      if (poison) { fault(op_.site, "wgmma reads operand %s at %s, which nobody wrote", operand, region(offset, kGranule).c_str()); }
      return;
    }
    if (granule.copy == latest_copy_) { return; }
    Copy const& copy = cta->copies[granule.copy - 1];
    if (!copy.landed) {
      fault(op_.site, "wgmma reads operand %s at %s, destination of a copy in flight%s", operand, region(offset, kGranule).c_str(),
            place(copy.site).c_str());
    }
    latest_copy_ = granule.copy;
    op_.needs.push_back({static_cast<int>(cta->mbarrier_entry(copy.barrier)), copy.phase + 2});
    op_.origin.push_back({static_cast<int>(granule.copy - 1), offset});
  }

  WgmmaOp& op_;
  int warpgroup_;
  std::uint32_t seq_;
  std::uint32_t latest_copy_ = 0;
};

}  // namespace

float element_value(ElementKind kind, std::uint32_t bits) {
  if (kind == ElementKind::kFloat8E4m3) { return kE4m3Values[bits]; }
  if (kind == ElementKind::kFloat8E5m2) { return element_value(ElementKind::kFloat16, bits << 8); }  // float16 cut short
  std::uint32_t wide;
  if (kind == ElementKind::kBfloat16) {
    wide = bits << 16;
  } else {
    std::uint32_t const sign = (bits & 0x8000) << 16;
    std::uint32_t const exponent = bits >> 10 & 0x1F;
    std::uint32_t const mantissa = bits & 0x3FF;
    if (exponent == 0) {
      float const value = static_cast<float>(mantissa) * 0x1p-24f;
      return sign != 0 ? -value : value;
    }
    wide = sign | (exponent == 0x1F ? 0x7F800000 : (exponent + 112) << 23) | mantissa << 13;
  }
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void read_operands(WgmmaOp& op, int warpgroup, std::uint32_t seq) {
  Reader reader(op, warpgroup, seq);
  int const per_unit = op.call.depth() / 2;
  if (op.call.a == nullptr) {
    Descriptor const a = decode(op.call.descriptor_a, op.site);
    for (int row = 0; row < 64; ++row) {
      for (int unit = 0; unit < 2; ++unit) {
        reader.unit(a, k_major_unit(a, row, unit), op.call.element, "A", &op.a[row][unit * per_unit], 1);
      }
    }
  }
  Descriptor const b = decode(op.call.descriptor_b, op.site);
  if (op.call.b_is_mn_major) {
    for (int k = 0; k < 16; ++k) {
      for (int unit = 0; unit < op.call.columns / kUnitElements; ++unit) {
        reader.unit(b, mn_major_unit(b, k, unit), op.call.element_b, "B", &op.b[k][unit * kUnitElements], 1);
      }
    }
  } else {
    for (int row = 0; row < op.call.columns; ++row) {
      for (int unit = 0; unit < 2; ++unit) {
        reader.unit(b, k_major_unit(b, row, unit), op.call.element_b, "B", &op.b[unit * per_unit][row], 256);
      }
    }
  }
}

bool operands_are_unchanged(WgmmaOp const& op) {
  for (WgmmaOp::Read const& read : op.reads) {
    if (std::memcmp(read.bytes.data(), cta->shared + read.offset, kGranule) != 0) { return false; }
  }
  return true;
}

}  // namespace cutlass_fa::executor
