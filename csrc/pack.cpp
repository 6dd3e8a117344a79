// Encoded rows into the panels of panel.hpp. Codes keep their values: packing loses nothing.
// Source layouts: ggml's block structures (ggml-common.h).
#include "block_types.hpp"
#include "kernels.hpp"
#include "panel.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {
namespace {

// One block of one row, taken apart. Codes as the panel stores them; s and t by group, or by half group.
struct Parts {
  uint8_t d[4], m[2];  // f16 or f32; f16
  uint8_t s[16], t[16];
  uint8_t codes[256];
};

inline void copy(uint8_t* to, const uint8_t* from, int bytes) { std::memcpy(to, from, size_t(bytes)); }

// K-quants subtract their minimum; panels add it.
inline void copy_negated_half(uint8_t* to, const uint8_t* from) {
  copy(to, from, 2);
  to[1] ^= 0x80;
}

// 16 bytes to 32 codes: low halves first.
inline void nibbles(const uint8_t* __restrict q, uint8_t* __restrict codes, int count = 16) {
  for (int i = 0; i < count; i++) codes[i] = q[i] & 15, codes[count + i] = q[i] >> 4;
}

// The 6-bit scales and minima of Q4_K and Q5_K.
inline void six_bit_pairs(const uint8_t* p, Parts& out) {
  for (int j = 0; j < 4; j++) {
    out.s[j] = p[j] & 63;
    out.t[j] = p[j + 4] & 63;
    out.s[j + 4] = uint8_t((p[j + 8] & 15) | (p[j] >> 6 << 4));
    out.t[j + 4] = uint8_t(p[j + 8] >> 4 | (p[j + 4] >> 6 << 4));
  }
}

template <int Type>
inline void take_apart(const uint8_t* __restrict p, Parts& out) {
  uint8_t* __restrict const codes = out.codes;
  if constexpr (Type == kQ4_0 || Type == kIQ4_NL) {
    copy(out.d, p, 2);
    nibbles(p + 2, codes);
  } else if constexpr (Type == kQ4_1) {
    copy(out.d, p, 2);
    copy(out.m, p + 2, 2);
    nibbles(p + 4, codes);
  } else if constexpr (Type == kQ5_0 || Type == kQ5_1) {
    constexpr int header = Type == kQ5_0 ? 2 : 4;
    copy(out.d, p, 2);
    if (Type == kQ5_1) copy(out.m, p + 2, 2);
    nibbles(p + header + 4, codes);
    for (int i = 0; i < 32; i++) {
      codes[i] |= (p[header + i / 8] >> i % 8 & 1) << 4;
      if (Type == kQ5_0) codes[i] += 128 - 16;
    }
  } else if constexpr (Type == kQ8_0) {
    copy(out.d, p, 2);
    for (int i = 0; i < 32; i++) codes[i] = p[2 + i] ^ 0x80;
  } else if constexpr (Type == kQ8_K) {
    copy(out.d, p, 4);
    for (int i = 0; i < 256; i++) codes[i] = p[4 + i] ^ 0x80;
  } else if constexpr (Type == kQ4_K || Type == kQ5_K) {
    copy(out.d, p, 2);
    copy_negated_half(out.m, p + 2);
    six_bit_pairs(p + 4, out);
    const uint8_t *high = p + 16, *low = Type == kQ4_K ? p + 16 : p + 48;
    for (int g = 0; g < 8; g += 2) nibbles(low + g * 16, codes + g * 32, 32);
    if (Type == kQ5_K) {
      for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++) codes[g * 32 + i] |= (high[i] >> g & 1) << 4;
    }
  } else if constexpr (Type == kQ6_K) {
    for (int half = 0; half < 2; half++) {
      const uint8_t *low = p + half * 64, *high = p + 128 + half * 32;
      nibbles(low, codes + half * 128, 64);
      for (int g = 0; g < 4; g++)
        for (int i = 0; i < 32; i++) {
          uint8_t& code = codes[half * 128 + g * 32 + i];
          code = uint8_t(code | (high[i] >> 2 * g & 3) << 4);
        }
    }
    copy(out.s, p + 192, 16);
    copy(out.d, p + 208, 2);
  } else if constexpr (Type == kQ2_K) {
    for (int i = 0; i < 16; i++) out.s[i] = p[i] & 15, out.t[i] = p[i] >> 4;
    for (int i = 0; i < 256; i++) codes[i] = p[16 + i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3;
    copy(out.d, p + 80, 2);
    copy_negated_half(out.m, p + 82);
  } else if constexpr (Type == kQ3_K) {
    for (int i = 0; i < 256; i++) {
      const int low = p[32 + i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3, high = p[i % 32] >> i / 32 & 1;
      codes[i] = uint8_t((low | high << 2) + 128 - 4);
    }
    for (int i = 0; i < 16; i++) {
      const int low = p[96 + i % 8] >> i / 8 * 4 & 15, high = p[104 + i % 4] >> i / 4 * 2 & 3;
      out.s[i] = uint8_t((low | high << 4) - 32);
    }
    copy(out.d, p + 108, 2);
  } else if constexpr (Type == kIQ4_XS) {
    copy(out.d, p, 2);
    const int high = p[2] | p[3] << 8;
    for (int g = 0; g < 8; g++) {
      out.s[g] = uint8_t(((p[4 + g / 2] >> g % 2 * 4 & 15) | (high >> 2 * g & 3) << 4) - 32);
      nibbles(p + 8 + g * 16, codes + g * 32);
    }
  }
}

// Puts one row's block into its place among the panel's rows.
template <PanelFormat F>
inline void put(const Parts& parts, uint8_t* block, int row) {
  constexpr int groups = block_columns(F) / kGroup;
  constexpr int d_bytes = F.scales == Scales::Single ? 4 : 2;
  copy(block + d_bytes * row, parts.d, d_bytes);
  if constexpr (block_header_bytes(F) == 4 * kPanelRows && d_bytes == 2) copy(block + 2 * kPanelRows + 2 * row, parts.m, 2);
  constexpr bool halves = F.scales == Scales::HalfGroup || F.scales == Scales::HalfGroupMin;
  constexpr bool minima = F.scales == Scales::SubMin || F.scales == Scales::HalfGroupMin;
  if constexpr (group_scale_bytes(F) > 0) {
    for (int i = 0; i < groups * (halves ? 2 : 1); i++) {
      uint8_t* sub = block + block_header_bytes(F) + i * kPanelRows * (minima ? 2 : 1);
      sub[row] = parts.s[i];
      if constexpr (minima) sub[kPanelRows + row] = parts.t[i];
    }
  }
  for (int g = 0; g < groups; g++) {
    const uint8_t* codes = parts.codes + g * kGroup;
    uint8_t* out = block + block_scale_bytes(F) + g * group_code_bytes(F) + 4 * row;
    if constexpr (group_code_bytes(F) == kPanelRows * kGroup) {
      for (int q = 0; q < 8; q++) copy(out + q * 4 * kPanelRows, codes + 4 * q, 4);
    } else {
      uint8_t pairs[16];
      for (int i = 0; i < 16; i++) pairs[i] = uint8_t((codes[i] & 15) | codes[16 + i] << 4);
      for (int v = 0; v < 4; v++) copy(out + v * 4 * kPanelRows, pairs + 4 * v, 4);
    }
    if constexpr (F.codes == Codes::SixBits) {
      for (int p = 0; p < 2; p++) {
        uint32_t high = 0;  // four bytes at a time, each on its own
        for (int k = 0; k < 4; k++) {
          uint32_t four;
          std::memcpy(&four, codes + 16 * p + 4 * k, 4);
          high |= (four >> 4 & 0x03030303) << 2 * k;
        }
        std::memcpy(out + (4 + p) * 4 * kPanelRows, &high, 4);
      }
    }
  }
}

// One panel of `rows` <= 16 rows.
template <PanelFormat F>
void pack_panel(const uint8_t* source, int64_t row_bytes, int rows, int64_t columns, uint8_t* panel) {
  constexpr BlockShape shape = block_shape(F.type);
  constexpr int bytes = block_bytes(F);
  for (int64_t b = 0; b < columns / shape.numbers; b++, panel += bytes) {
    if (rows < kPanelRows) std::memset(panel, 0, bytes);
    for (int row = 0; row < rows; row++) {
      const uint8_t* p = source + row * row_bytes + b * shape.bytes;
      if constexpr (F.scales == Scales::None) {
        copy(panel + row * shape.bytes, p, shape.bytes);
      } else {
        Parts parts;
        take_apart<F.type>(p, parts);
        put<F>(parts, panel, row);
      }
    }
  }
}

using PackPanel = void (*)(const uint8_t* source, int64_t row_bytes, int rows, int64_t columns, uint8_t* panel);

template <int... Type>
PackPanel find(int type) {
  PackPanel found = nullptr;
  ((type == Type ? void(found = pack_panel<panel_format(Type)>) : void()), ...);
  return found;
}

}  // namespace

void pack(ThreadPool& pool, int type, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* packed) {
  const PackPanel pack_one = find<kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kQ8_K,
                                  kIQ4_NL, kIQ4_XS>(type);
  const BlockShape shape = block_shape(type);
  const int64_t row_bytes = columns / shape.numbers * shape.bytes;
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows, panel_bytes = packed_bytes(type, kPanelRows, columns);
  pool.run(panels, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t left = rows - i * kPanelRows;
      pack_one(source + i * kPanelRows * row_bytes, row_bytes, int(left < kPanelRows ? left : kPanelRows), columns, packed + i * panel_bytes);
    }
  });
}

}  // namespace puna::PUNA_ISA
