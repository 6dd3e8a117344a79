// Encoders of blocks of 32 numbers: puna/tensor/legacy.py, iquants.py.
#include "block_types.hpp"
#include "encode_tiles.hpp"

namespace puna::PUNA_ISA {
namespace {

void write_codes(const uint8_t* codes, bool five_bits, uint8_t* out) {
  if (five_bits) pack<1, 1, 4>(codes, out, 4);
  pack<4, 16, 16>(codes, out + (five_bits ? 4 : 0));
}

bool encode_iq4_nl(Tile<32>& tile, int blocks, uint8_t* out) {
  WholeScales<1> scales;
  each_group<32>(tile, [&](int first, const Lanes* x, const Lanes* weight) { put(scales.factor + first, level_fit<32>(x, weight)); });
  if (!scales.round_factors()) return false;
  for (int b = 0; b < blocks; ++b, out += 18) {
    const float inverse = reciprocal(scales.factor[b]);
    for (int i = 0; i < 32; ++i) tile.codes[b * 32 + i] = level_code(tile.x[b * 32 + i] * inverse);
    write_half(out, scales.half[b]);
    pack<4, 16, 16>(tile.codes + b * 32, out + 2);
  }
  return true;
}

// Q4_0 and Q5_0, searched for with weights.
template <int Bits>
bool encode_symmetric(Tile<32>& tile, int blocks, uint8_t* out) {
  constexpr int kHalf = 1 << (Bits - 1), kBytes = Bits == 5 ? 22 : 18;
  WholeScales<1> scales;
  each_group<32>(tile, [&](int first, const Lanes* x, const Lanes* weight) {
    put(scales.factor + first, symmetric_fit<32>(x, weight, kHalf));
  });
  if (!scales.round_factors()) return false;
  for (int b = 0; b < blocks; ++b, out += kBytes) {
    const float inverse = reciprocal(scales.factor[b]);
    for (int i = 0; i < 32; ++i)
      tile.codes[b * 32 + i] = uint8_t(whole(tile.x[b * 32 + i] * inverse, float(-kHalf), float(kHalf - 1)) + float(kHalf));
    write_half(out, scales.half[b]);
    write_codes(tile.codes + b * 32, Bits == 5, out + 2);
  }
  return true;
}

// Q4_1 and Q5_1, searched for with weights.
template <int Bits>
bool encode_affine(Tile<32>& tile, int blocks, uint8_t* out) {
  constexpr int kSteps = (1 << Bits) - 1, kBytes = Bits == 5 ? 24 : 20;
  WholeScales<1> scales, lows;
  each_group<32>(tile, [&](int first, const Lanes* x, const Lanes* weight) {
    Lanes shift = x[0], scale, offset, moved[32];
    for (int i = 1; i < 32; ++i) shift = choose(x[i] < shift, x[i], shift);
    shift = choose(shift > Lanes{}, shift, Lanes{});
    for (int i = 0; i < 32; ++i) moved[i] = x[i] - shift;
    affine_fit<32>(moved, weight, kSteps, scale, offset);
    put(scales.factor + first, scale);
    put(lows.factor + first, shift - offset);
  });
  if (!scales.round_factors() || !lows.round_factors()) return false;
  for (int b = 0; b < blocks; ++b, out += kBytes) {
    const float inverse = reciprocal(scales.factor[b]), low = lows.factor[b];
    for (int i = 0; i < 32; ++i) tile.codes[b * 32 + i] = uint8_t(whole((tile.x[b * 32 + i] - low) * inverse, 0.0f, float(kSteps)));
    write_half(out, scales.half[b]);
    write_half(out + 2, lows.half[b]);
    write_codes(tile.codes + b * 32, Bits == 5, out + 4);
  }
  return true;
}

// ---- ggml's reference quantizers of the legacy types, which search for nothing ----

float careful_reciprocal(float scale) { return std::fabs(scale) >= 0x1p-126f ? 1.0f / scale : 0.0f; }

template <int Bits>
bool plain_symmetric(const float* x, uint8_t* out) {
  constexpr int kHalf = 1 << (Bits - 1);
  float largest = x[0];
  bool good = true;
  for (int i = 0; i < 32; ++i) {
    largest = std::fabs(x[i]) > std::fabs(largest) ? x[i] : largest;
    good &= x[i] == x[i];
  }
  float stored = largest / float(-kHalf);
  const float inverse = careful_reciprocal(stored);
  uint16_t half;
  if (!as_half(stored, half) || !good) return false;
  uint8_t codes[32];
  for (int i = 0; i < 32; ++i) {
    const float code = x[i] * inverse + (float(kHalf) + 0.5f);
    codes[i] = uint8_t(code < float(2 * kHalf - 1) ? code : float(2 * kHalf - 1));
  }
  write_half(out, half);
  write_codes(codes, Bits == 5, out + 2);
  return true;
}

template <int Bits>
bool plain_affine(const float* x, uint8_t* out) {
  constexpr int kSteps = (1 << Bits) - 1;
  float low = x[0], high = x[0];
  bool good = true;
  for (int i = 0; i < 32; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    good &= x[i] == x[i];
  }
  float scale = (high - low) / float(kSteps), stored_low = low;
  const float inverse = careful_reciprocal(scale);
  uint16_t half, low_half;
  if (!as_half(scale, half) || !as_half(stored_low, low_half) || !good) return false;
  uint8_t codes[32];
  for (int i = 0; i < 32; ++i) {
    const float code = (x[i] - low) * inverse + 0.5f;
    codes[i] = uint8_t(code < float(kSteps) ? code : float(kSteps));
  }
  write_half(out, half);
  write_half(out + 2, low_half);
  write_codes(codes, Bits == 5, out + 4);
  return true;
}

bool plain_q8_0(const float* x, uint8_t* out) {
  float largest = 0;
  bool good = true;
  for (int i = 0; i < 32; ++i) {
    largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    good &= x[i] == x[i];
  }
  float scale = largest / 127.0f;
  const float inverse = careful_reciprocal(scale);
  uint16_t half;
  if (!as_half(scale, half) || !good) return false;
  write_half(out, half);
  for (int i = 0; i < 32; ++i) {
    const float scaled = x[i] * inverse, cut = float(int(scaled));
    out[2 + i] = uint8_t(int(cut) + int(2 * (scaled - cut)));  // halves away from zero
  }
  return true;
}

}  // namespace

SmallTileEncoder small_tile_encoder(int type, bool weighted) {
  switch (type) {
    case kIQ4_NL: return encode_iq4_nl;
    case kQ4_0: return weighted ? encode_symmetric<4> : nullptr;
    case kQ5_0: return weighted ? encode_symmetric<5> : nullptr;
    case kQ4_1: return weighted ? encode_affine<4> : nullptr;
    case kQ5_1: return weighted ? encode_affine<5> : nullptr;
    default: return nullptr;
  }
}

BlockEncoder block_encoder(int type) {
  switch (type) {
    case kQ4_0: return plain_symmetric<4>;
    case kQ5_0: return plain_symmetric<5>;
    case kQ4_1: return plain_affine<4>;
    case kQ5_1: return plain_affine<5>;
    case kQ8_0: return plain_q8_0;
    default: return nullptr;
  }
}

}  // namespace puna::PUNA_ISA
