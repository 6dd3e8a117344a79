// The compute layout of a matrix: one family for every type, the same bytes for every instruction set.
//
// A matrix [N, K] becomes ceil(N / 16) panels of 16 rows; missing rows of the last have zero scales. A panel is K / block
// blocks in order, and a block is its scales, then the codes of its groups of 32 inner values. The unit of codes is the 64-byte
// vector of 16 rows x 4 inner values (a "quad"): byte 4 r + i belongs to row r, inner value 4 q + i, so that one integer
// dot-product instruction advances 16 rows (or half, or a quarter of them on narrower machines) by 4 inner values, with the
// activation broadcast and no horizontal sum.
//   bytes:   8 vectors a group, quad 0 ... 7
//   nibbles: 4 vectors a group, vector v holds quad v in its low halves and quad v + 4 in its high halves
//   six bits: the low halves as nibbles, then 2 vectors of high bits: vector p holds those of quads 4 p ... 4 p + 3, two bits each
// Types of 2, 3 and 5 bits are widened to bytes for now.
//
// Scales of a block, each an array over the 16 rows:
//   Half            f16 d                                        block 32    w = d (q - zero)
//   HalfMin         f16 d, f16 m                                 block 32    w = d q + m
//   Single          f32 d                                        block 256   w = d (q - zero)
//   Sub             f16 d, then i8 s for each group              block 256   w = d s (q - zero)
//   SubMin          f16 d, f16 m, then u8 s, u8 t a group        block 256   w = d s q + m t
//   HalfGroup       f16 d, then i8 s for each half group         block 256   w = d s (q - zero)
//   HalfGroupMin    f16 d, f16 m, then u8 s, u8 t a half group   block 256   w = d s q + m t
// Floats have no blocks: for each inner value, 16 rows of F32, F16 or BF16.
//
// Only constants and consteval functions here: nothing of this header becomes code (see the rules in kernels.hpp).
#pragma once

#include <cstdint>

#include "block_types.hpp"

namespace puna {

// The version of all of the above: raised with every change of the bytes, so that packed files of another layout are not used.
constexpr int kPanelLayout = 2;
constexpr int kPanelRows = 16;
constexpr int kGroup = 32;

enum class Scales { None, Half, HalfMin, Single, Sub, SubMin, HalfGroup, HalfGroupMin };
enum class Codes { Nibbles, NibbleTable, SixBits, UnsignedBytes, SignedBytes, F32, F16, BF16 };

// Nibbles q stand for q - zero, NibbleTable for an entry of kIq4Values, SignedBytes q for q - 128,
// SixBits q for q - 32, UnsignedBytes (at most 31) for q.
struct PanelFormat {
  int type;
  Scales scales;
  Codes codes;
  int zero;
};

constexpr PanelFormat kPanelFormats[] = {
    {kF32, Scales::None, Codes::F32, 0},
    {kF16, Scales::None, Codes::F16, 0},
    {kBF16, Scales::None, Codes::BF16, 0},
    {kQ4_0, Scales::Half, Codes::Nibbles, 8},
    {kQ4_1, Scales::HalfMin, Codes::Nibbles, 0},
    {kQ5_0, Scales::Half, Codes::SignedBytes, 128},
    {kQ5_1, Scales::HalfMin, Codes::UnsignedBytes, 0},
    {kQ8_0, Scales::Half, Codes::SignedBytes, 128},
    {kQ2_K, Scales::HalfGroupMin, Codes::UnsignedBytes, 0},
    {kQ3_K, Scales::HalfGroup, Codes::SignedBytes, 128},
    {kQ4_K, Scales::SubMin, Codes::Nibbles, 0},
    {kQ5_K, Scales::SubMin, Codes::UnsignedBytes, 0},
    {kQ6_K, Scales::HalfGroup, Codes::SixBits, 32},
    {kQ8_K, Scales::Single, Codes::SignedBytes, 128},
    {kIQ4_NL, Scales::Half, Codes::NibbleTable, 128},
    {kIQ4_XS, Scales::Sub, Codes::NibbleTable, 128},
};

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

consteval PanelFormat panel_format(int type) {
  for (const PanelFormat& format : kPanelFormats)
    if (format.type == type) return format;
  throw "no such type";
}

// Inner values of one block; the row length is a multiple of it.
consteval int block_columns(PanelFormat f) {
  return f.scales == Scales::None ? 1 : f.scales == Scales::Half || f.scales == Scales::HalfMin ? kGroup : 256;
}

// Bytes before the scales of the first group.
consteval int block_header_bytes(PanelFormat f) {
  switch (f.scales) {
    case Scales::None: return 0;
    case Scales::Half: case Scales::Sub: case Scales::HalfGroup: return 2 * kPanelRows;
    default: return 4 * kPanelRows;
  }
}

// Bytes of sub-scales of one group of 32.
consteval int group_scale_bytes(PanelFormat f) {
  switch (f.scales) {
    case Scales::Sub: return kPanelRows;
    case Scales::SubMin: case Scales::HalfGroup: return 2 * kPanelRows;
    case Scales::HalfGroupMin: return 4 * kPanelRows;
    default: return 0;
  }
}

consteval int group_code_bytes(PanelFormat f) {
  constexpr int bytes = kPanelRows * kGroup;
  return f.codes == Codes::Nibbles || f.codes == Codes::NibbleTable ? bytes / 2 : f.codes == Codes::SixBits ? bytes * 3 / 4 : bytes;
}

consteval int block_scale_bytes(PanelFormat f) {
  return block_header_bytes(f) + block_columns(f) / kGroup * group_scale_bytes(f);
}

// Bytes of one block of a panel.
consteval int block_bytes(PanelFormat f) {
  if (f.codes == Codes::F32) return 4 * kPanelRows;
  if (f.scales == Scales::None) return 2 * kPanelRows;
  return block_scale_bytes(f) + block_columns(f) / kGroup * group_code_bytes(f);
}

// One row of the table that panel.cpp makes of the above, for code that learns the type when it runs.
struct PanelSize {
  int type, block_columns, block_bytes;
};
const PanelSize* find_panel_size(int type);  // null when the type has no packed form

}  // namespace puna
