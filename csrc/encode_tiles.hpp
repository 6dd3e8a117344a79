// Blocks to encode, as many at once as a vector has lanes: their scales as whole multiples of a float16 factor, their codes, and the
// bit fields that these become.
#pragma once

#include <cmath>

#include "fits.hpp"

namespace puna::PUNA_ISA {

// The numbers of kLanes blocks, their weights, and their codes.
template <int Numbers>
struct Tile {
  float x[kLanes * Numbers], weight[kLanes * Numbers];
  uint8_t codes[kLanes * Numbers];
};

// Fits Size numbers a group, all groups of a tile, and calls take(first group of the vector, x, weight).
template <int Size, int Numbers, class Take>
inline void each_group(const Tile<Numbers>& tile, const Take& take) {
  for (int first = 0; first < kLanes * Numbers / Size; first += kLanes) {
    Lanes x[Size], weight[Size];
    transpose(tile.x + first * Size, Size, x);
    transpose(tile.weight + first * Size, Size, weight);
    take(first, x, weight);
  }
}

inline void put(float* at, Lanes values) { std::memcpy(at, &values, sizeof values); }

// Whether float16 can hold it; `half` is then its bits, and `value` what they stand for.
inline bool as_half(float& value, uint16_t& half) {
  half = float_to_half(value);
  value = half_to_float(half);
  return value - value == 0;
}

template <int Groups>
struct WholeScales {
  float factor[kLanes];  // as float16 has it
  uint16_t half[kLanes];
  float whole[kLanes][Groups];

  bool round_factors() {
    bool good = true;
    for (int block = 0; block < kLanes; ++block) good &= as_half(factor[block], half[block]);
    return good;
  }
};

// Numbers >= 0 [kLanes blocks, Groups] as whole multiples, up to `most`, of a float16 factor.
template <int Groups>
inline bool make_whole(const float* numbers, const float* weights, int most, WholeScales<Groups>& out) {
  Lanes x[Groups], weight[Groups];
  transpose(numbers, Groups, x);
  transpose(weights, Groups, weight);
  put(out.factor, whole_fit<Groups>(x, weight, most));
  const bool good = out.round_factors();
  for (int block = 0; block < kLanes; ++block)
    for (int g = 0; g < Groups; ++g)
      out.whole[block][g] = whole(numbers[block * Groups + g] * reciprocal(out.factor[block]), 0.0f, float(most));
  return good;
}

template <int Size>
inline bool affine_blocks(Tile<256>& tile, int steps, int most, WholeScales<256 / Size>& scales, WholeScales<256 / Size>& minima) {
  constexpr int kGroups = 256 / Size;
  float scale[kLanes * kGroups], minimum[kLanes * kGroups], spread[kLanes * kGroups], total[kLanes * kGroups];
  each_group<Size>(tile, [&](int first, const Lanes* x, const Lanes* weight) {
    Lanes fitted, low, squares{}, sum{};
    affine_fit<Size>(x, weight, steps, fitted, low);
    for (int i = 0; i < Size; ++i) {
      squares += weight[i] * x[i] * x[i];
      sum += weight[i];
    }
    put(scale + first, fitted);
    put(minimum + first, low);
    put(spread + first, divide(squares, fitted * fitted));
    put(total + first, sum);
  });
  bool good = make_whole<kGroups>(scale, spread, most, scales);
  good &= make_whole<kGroups>(minimum, total, most, minima);
  for (int block = 0; block < kLanes; ++block)
    for (int g = 0; g < kGroups; ++g) {
      const float inverse = reciprocal(scales.factor[block] * scales.whole[block][g]);
      const float offset = minima.factor[block] * minima.whole[block][g];
      const float* x = tile.x + block * 256 + g * Size;
      uint8_t* code = tile.codes + block * 256 + g * Size;
      for (int i = 0; i < Size; ++i) code[i] = uint8_t(whole((x[i] + offset) * inverse, 0.0f, float(steps)));
    }
  return good;
}

// Scales of either sign [kLanes blocks, Groups] as whole multiples from -most to most - 1 of a float16 factor.
template <int Groups>
inline bool make_signed(const float* numbers, int most, WholeScales<Groups>& out) {
  for (int block = 0; block < kLanes; ++block) {
    const float* own = numbers + block * Groups;
    float largest = own[0];
    for (int g = 1; g < Groups; ++g) largest = std::fabs(own[g]) > std::fabs(largest) ? own[g] : largest;
    out.factor[block] = largest / float(-most);
  }
  const bool good = out.round_factors();
  for (int block = 0; block < kLanes; ++block)
    for (int g = 0; g < Groups; ++g)
      out.whole[block][g] = whole(numbers[block * Groups + g] * reciprocal(out.factor[block]), float(-most), float(most - 1));
  return good;
}

inline bool symmetric_blocks(Tile<256>& tile, int half, int most, WholeScales<16>& scales) {
  float scale[kLanes * 16];
  each_group<16>(tile, [&](int first, const Lanes* x, const Lanes* weight) { put(scale + first, symmetric_fit<16>(x, weight, half)); });
  const bool good = make_signed<16>(scale, most, scales);
  for (int block = 0; block < kLanes; ++block)
    for (int g = 0; g < 16; ++g) {
      const float inverse = reciprocal(scales.factor[block] * scales.whole[block][g]);
      const float* x = tile.x + block * 256 + g * 16;
      uint8_t* code = tile.codes + block * 256 + g * 16;
      for (int i = 0; i < 16; ++i) code[i] = uint8_t(whole(x[i] * inverse, float(-half), float(half - 1)) + float(half));
    }
  return good;
}

inline uint8_t level_code(float scaled) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += scaled > middle(i);
  return uint8_t(code);
}

// The inverse of unpack in decode.cpp: fields codes[i] >> shift of Width bits into Bytes bytes.
template <int Width, int Run, int Bytes>
inline void pack(const uint8_t* codes, uint8_t* packed, int shift = 0) {
  for (int i = 0; i < Bytes; ++i) packed[i] = 0;
  for (int start = 0; start < Bytes; start += Run)
    for (int bit = 0; bit < 8; bit += Width)
      for (int i = 0; i < Run; ++i) packed[start + i] |= uint8_t((*codes++ >> shift & ((1 << Width) - 1)) << bit);
}

inline void write_half(uint8_t* out, uint16_t half) { std::memcpy(out, &half, 2); }

template <int Groups>
inline void to_bytes(const float* whole_numbers, float offset, uint8_t* out) {
  for (int g = 0; g < Groups; ++g) out[g] = uint8_t(int(whole_numbers[g] + offset));
}

// Encoders of `blocks` blocks of a tile, or of one block; they say false where a number can't be held. Null where a type has none.
using TileEncoder = bool (*)(Tile<256>& tile, int blocks, uint8_t* out);
using SmallTileEncoder = bool (*)(Tile<32>& tile, int blocks, uint8_t* out);
using BlockEncoder = bool (*)(const float* x, uint8_t* out);
TileEncoder tile_encoder(int type);
SmallTileEncoder small_tile_encoder(int type, bool weighted);
BlockEncoder block_encoder(int type);  // without a search

}  // namespace puna::PUNA_ISA
