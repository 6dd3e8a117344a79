// float32 to encoded blocks, bit for bit what the numpy encoders of puna/tensor give; puna/tensor/fit.py explains the search for
// scales. A vector's lanes hold as many groups of numbers (or blocks of groups), so sums need no order of their own: each lane
// adds up its group from first to last.
#include <atomic>
#include <cmath>

#include "block_types.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

using Lanes = float __attribute__((vector_size(kLanes * 4)));
using Mask = int32_t __attribute__((vector_size(kLanes * 4)));

constexpr float kTiny = 1e-30f;
constexpr float kBeyond = 1e8f;  // as check_storable: no scale that float16 holds reaches so far
constexpr float kRound = 0x1.8p23f;
constexpr int kTrials = 10;  // on either side of the obvious scale
constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

Lanes lanes(float x) { return Lanes{} + x; }
Lanes choose(Mask where, Lanes a, Lanes b) { return where ? a : b; }
Lanes magnitude(Lanes x) { return bit_cast<Lanes>(bit_cast<Mask>(x) & 0x7fffffff); }
Lanes divide(Lanes a, Lanes b) { return choose(magnitude(b) > lanes(kTiny), a / b, Lanes{}); }
Lanes clamp(Lanes x, float low, float high) {
  x = choose(x > lanes(low), x, lanes(low));
  return choose(x < lanes(high), x, lanes(high));
}
// To the nearest whole number within [low, high], ties to even.
Lanes whole(Lanes x, float low, float high) { return (clamp(x, low, high) + kRound) - kRound; }
float whole(float x, float low, float high) {
  x = x > low ? x : low;
  x = x < high ? x : high;
  return (x + kRound) - kRound;
}
float reciprocal(float x) { return x != 0 ? 1.0f / x : 0.0f; }

// Number i of kLanes groups of `size` numbers that follow each other.
void transpose(const float* x, int size, Lanes* out) {
  for (int i = 0; i < size; ++i) {
    float column[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) column[lane] = x[lane * size + i];
    std::memcpy(&out[i], column, sizeof column);
  }
}

// ---- fits: puna/tensor/fit.py ----

Lanes affine_error(Lanes total, Lanes first, Lanes second, Lanes q, Lanes qq, Lanes qx, Lanes scale, Lanes low) {
  const Lanes linear = scale * qx + low * first;
  const Lanes square = scale * scale * qq + scale * low * q * 2.0f + low * low * total;
  return second - linear * 2.0f + square;
}

template <int Size>
void affine_fit(const Lanes* x, const Lanes* weight, int steps, Lanes& best_scale, Lanes& minimum) {
  Lanes low{}, high = x[0], total{}, first{}, second{};
  for (int i = 0; i < Size; ++i) {
    low = choose(x[i] < low, x[i], low);
    high = choose(x[i] > high, x[i], high);
    total += weight[i];
    first += weight[i] * x[i];
    second += weight[i] * x[i] * x[i];
  }
  const Lanes span = high - low;
  Lanes best_low = low;
  best_scale = Lanes{};
  Lanes best_error = affine_error(total, first, second, Lanes{}, Lanes{}, Lanes{}, best_scale, best_low);
  for (int trial = -kTrials; trial <= kTrials; ++trial) {
    const Lanes inverse = divide(lanes(float(steps) + float(trial) * 0.1f), span);
    Lanes q{}, qq{}, qx{};
    for (int i = 0; i < Size; ++i) {
      const Lanes code = whole((x[i] - low) * inverse, 0.0f, float(steps)), weighted = weight[i] * code;
      q += weighted;
      qq += weighted * code;
      qx += weighted * x[i];
    }
    const Lanes determinant = total * qq - q * q;
    Lanes scale = divide(total * qx - first * q, determinant);
    Lanes new_low = divide(qq * first - q * qx, determinant);
    const Mask above = new_low > Lanes{};
    scale = choose(above, divide(qx, qq), scale);
    new_low = choose(above, Lanes{}, new_low);
    const Lanes error = affine_error(total, first, second, q, qq, qx, scale, new_low);
    const Mask better = (determinant > lanes(kTiny)) & (scale > Lanes{}) & (error < best_error);
    best_scale = choose(better, scale, best_scale);
    best_low = choose(better, new_low, best_low);
    best_error = choose(better, error, best_error);
  }
  minimum = -best_low;
}

// The scale by which code_of(x / scale) explains most; the number of largest magnitude gets about code `end`.
template <int Size, class CodeOf>
Lanes signed_fit(const Lanes* x, const Lanes* weight, float end, int trials, float step, const CodeOf& code_of) {
  Lanes largest = x[0];
  for (int i = 1; i < Size; ++i) largest = choose(magnitude(x[i]) > magnitude(largest), x[i], largest);
  Lanes best_scale{}, best_gain{};
  for (int trial = -trials; trial <= trials; ++trial) {
    const Lanes inverse = divide(lanes(end - float(trial) * step), largest);
    Lanes qx{}, qq{};
    for (int i = 0; i < Size; ++i) {
      const Lanes code = code_of(x[i] * inverse), weighted = weight[i] * code;
      qx += weighted * x[i];
      qq += weighted * code;
    }
    const Lanes scale = divide(qx, qq), gain = scale * qx;
    const Mask better = gain > best_gain;
    best_scale = choose(better, scale, best_scale);
    best_gain = choose(better, gain, best_gain);
  }
  return best_scale;
}

template <int Size>
Lanes symmetric_fit(const Lanes* x, const Lanes* weight, int half) {
  const float low = float(-half), high = float(half - 1);
  return signed_fit<Size>(x, weight, low, 9, 0.1f, [=](Lanes scaled) { return whole(scaled, low, high); });
}

template <int Size>
Lanes whole_fit(const Lanes* x, const Lanes* weight, int most) {
  const float high = float(most);
  return signed_fit<Size>(x, weight, high, kTrials, 0.1f, [=](Lanes scaled) { return whole(scaled, 0.0f, high); });
}

float middle(int i) { return (kLevels[i + 1] + kLevels[i]) * 0.5f; }

template <int Size>
Lanes level_fit(const Lanes* x, const Lanes* weight) {
  return signed_fit<Size>(x, weight, kLevels[0], kTrials, 1.5f, [](Lanes scaled) {
    Lanes level = lanes(kLevels[0]);
    for (int i = 0; i < 15; ++i) level += choose(scaled > lanes(middle(i)), lanes(kLevels[i + 1] - kLevels[i]), Lanes{});
    return level;
  });
}

// ---- blocks: as many at once as there are lanes ----

// The numbers of kLanes blocks, their weights, and their codes.
template <int Numbers>
struct Tile {
  float x[kLanes * Numbers], weight[kLanes * Numbers];
  uint8_t codes[kLanes * Numbers];
};

// Fits Size numbers a group, all groups of a tile, and calls take(first group of the vector, x, weight).
template <int Size, int Numbers, class Take>
void each_group(const Tile<Numbers>& tile, const Take& take) {
  for (int first = 0; first < kLanes * Numbers / Size; first += kLanes) {
    Lanes x[Size], weight[Size];
    transpose(tile.x + first * Size, Size, x);
    transpose(tile.weight + first * Size, Size, weight);
    take(first, x, weight);
  }
}

void put(float* at, Lanes values) { std::memcpy(at, &values, sizeof values); }

// Whether float16 can hold it; `half` is then its bits, and `value` what they stand for.
bool as_half(float& value, uint16_t& half) {
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
bool make_whole(const float* numbers, const float* weights, int most, WholeScales<Groups>& out) {
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
bool affine_blocks(Tile<256>& tile, int steps, int most, WholeScales<256 / Size>& scales, WholeScales<256 / Size>& minima) {
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
bool make_signed(const float* numbers, int most, WholeScales<Groups>& out) {
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

bool symmetric_blocks(Tile<256>& tile, int half, int most, WholeScales<16>& scales) {
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

uint8_t level_code(float scaled) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += scaled > middle(i);
  return uint8_t(code);
}

// ---- layouts: puna/tensor/{legacy,kquants,iquants}.py ----

// The inverse of unpack in decode.cpp: fields codes[i] >> shift of Width bits into Bytes bytes.
template <int Width, int Run, int Bytes>
void pack(const uint8_t* codes, uint8_t* packed, int shift = 0) {
  for (int i = 0; i < Bytes; ++i) packed[i] = 0;
  for (int start = 0; start < Bytes; start += Run)
    for (int bit = 0; bit < 8; bit += Width)
      for (int i = 0; i < Run; ++i) packed[start + i] |= uint8_t((*codes++ >> shift & ((1 << Width) - 1)) << bit);
}

void write_half(uint8_t* out, uint16_t half) { std::memcpy(out, &half, 2); }

template <int Groups>
void to_bytes(const float* whole_numbers, float offset, uint8_t* out) {
  for (int g = 0; g < Groups; ++g) out[g] = uint8_t(int(whole_numbers[g] + offset));
}

void pack_scales_and_minima(const float* scales, const float* minima, uint8_t* out) {
  uint8_t s[8], m[8];
  to_bytes<8>(scales, 0, s);
  to_bytes<8>(minima, 0, m);
  for (int g = 0; g < 4; ++g) {
    out[g] = uint8_t(s[g] | s[g + 4] >> 4 << 6);
    out[g + 4] = uint8_t(m[g] | m[g + 4] >> 4 << 6);
    out[g + 8] = uint8_t((s[g + 4] & 15) | (m[g + 4] & 15) << 4);
  }
}

bool encode_q2_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<16> scales, minima;
  if (!affine_blocks<16>(tile, 3, 15, scales, minima)) return false;
  for (int b = 0; b < blocks; ++b, out += 84) {
    for (int g = 0; g < 16; ++g) out[g] = uint8_t(int(scales.whole[b][g]) | int(minima.whole[b][g]) << 4);
    pack<2, 32, 64>(tile.codes + b * 256, out + 16);
    write_half(out + 80, scales.half[b]);
    write_half(out + 82, minima.half[b]);
  }
  return true;
}

bool encode_q3_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<16> scales;
  if (!symmetric_blocks(tile, 4, 32, scales)) return false;
  for (int b = 0; b < blocks; ++b, out += 110) {
    uint8_t stored[16];
    to_bytes<16>(scales.whole[b], 32, stored);
    pack<1, 32, 32>(tile.codes + b * 256, out, 2);
    pack<2, 32, 64>(tile.codes + b * 256, out + 32);
    pack<4, 8, 8>(stored, out + 96);
    pack<2, 4, 4>(stored, out + 104, 4);
    write_half(out + 108, scales.half[b]);
  }
  return true;
}

template <int Bits>
bool encode_q45_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<8> scales, minima;
  if (!affine_blocks<32>(tile, (1 << Bits) - 1, 63, scales, minima)) return false;
  constexpr int kHigh = Bits == 5 ? 32 : 0;
  for (int b = 0; b < blocks; ++b, out += 144 + kHigh) {
    write_half(out, scales.half[b]);
    write_half(out + 2, minima.half[b]);
    pack_scales_and_minima(scales.whole[b], minima.whole[b], out + 4);
    if (kHigh) pack<1, 32, 32>(tile.codes + b * 256, out + 16, 4);
    pack<4, 32, 128>(tile.codes + b * 256, out + 16 + kHigh);
  }
  return true;
}

bool encode_q6_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<16> scales;
  if (!symmetric_blocks(tile, 32, 128, scales)) return false;
  for (int b = 0; b < blocks; ++b, out += 210) {
    pack<4, 64, 128>(tile.codes + b * 256, out);
    pack<2, 32, 64>(tile.codes + b * 256, out + 128, 4);
    to_bytes<16>(scales.whole[b], 0, out + 192);
    write_half(out + 208, scales.half[b]);
  }
  return true;
}

bool encode_iq4_xs(Tile<256>& tile, int blocks, uint8_t* out) {
  float scale[kLanes * 8];
  each_group<32>(tile, [&](int first, const Lanes* x, const Lanes* weight) { put(scale + first, level_fit<32>(x, weight)); });
  WholeScales<8> scales;
  if (!make_signed<8>(scale, 32, scales)) return false;
  for (int b = 0; b < blocks; ++b, out += 136) {
    for (int i = 0; i < 256; ++i)
      tile.codes[b * 256 + i] = level_code(tile.x[b * 256 + i] * reciprocal(scales.factor[b] * scales.whole[b][i / 32]));
    uint8_t stored[8];
    to_bytes<8>(scales.whole[b], 32, stored);
    write_half(out, scales.half[b]);
    pack<2, 1, 2>(stored, out + 2, 4);
    pack<4, 1, 4>(stored, out + 4);
    pack<4, 16, 128>(tile.codes + b * 256, out + 8);
  }
  return true;
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

void write_codes(const uint8_t* codes, bool five_bits, uint8_t* out) {
  if (five_bits) pack<1, 1, 4>(codes, out, 4);
  pack<4, 16, 16>(codes, out + (five_bits ? 4 : 0));
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

using TileEncoder = bool (*)(Tile<256>& tile, int blocks, uint8_t* out);
using SmallTileEncoder = bool (*)(Tile<32>& tile, int blocks, uint8_t* out);

TileEncoder tile_encoder(int type) {
  switch (type) {
    case kQ2_K: return encode_q2_k;
    case kQ3_K: return encode_q3_k;
    case kQ4_K: return encode_q45_k<4>;
    case kQ5_K: return encode_q45_k<5>;
    case kQ6_K: return encode_q6_k;
    case kIQ4_XS: return encode_iq4_xs;
    default: return nullptr;
  }
}

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

using BlockEncoder = bool (*)(const float* x, uint8_t* out);

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

// Blocks first to end of all rows; each row has `per_row` of them.
template <int Numbers, class Encoder>
bool encode_tiles(Encoder encode, int bytes, int64_t per_row, const float* x, const float* importance, int64_t first,
                  int64_t end, uint8_t* out) {
  Tile<Numbers> tile;
  for (int64_t b = first; b < end; b += kLanes) {
    const int count = int(end - b < kLanes ? end - b : kLanes);
    std::memset(&tile, 0, sizeof tile);
    std::memcpy(tile.x, x + b * Numbers, size_t(count) * Numbers * 4);
    for (int i = 0; i < count * Numbers; ++i)
      if (!(std::fabs(tile.x[i]) < kBeyond)) return false;
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < Numbers; ++j) tile.weight[i * Numbers + j] = importance ? importance[(b + i) % per_row * Numbers + j] : 1.0f;
    if (!encode(tile, count, out + b * bytes)) return false;
  }
  return true;
}

}  // namespace

// Rows of numbers x [rows, columns] as blocks of `type`; importance [columns] or null. False for a type without an encoder, and
// where a number can't be held by a block.
bool encode_rows(ThreadPool& pool, int type, int64_t rows, int64_t columns, const float* x, const float* importance, uint8_t* out) {
  const BlockShape shape = block_shape(type);
  const int64_t per_row = columns / shape.numbers, blocks = rows * per_row;
  const TileEncoder large = tile_encoder(type);
  const SmallTileEncoder small = small_tile_encoder(type, importance != nullptr);
  const BlockEncoder plain = block_encoder(type);
  if (!large && !small && !plain) return false;
  std::atomic<bool> good{true};
  pool.run(blocks, int64_t{32768} / shape.numbers, [&](int64_t begin, int64_t end, int) {
    bool done = true;
    if (large)
      done = encode_tiles<256>(large, shape.bytes, per_row, x, importance, begin, end, out);
    else if (small)
      done = encode_tiles<32>(small, shape.bytes, per_row, x, importance, begin, end, out);
    else
      for (int64_t b = begin; b < end && done; ++b) done = plain(x + b * 32, out + b * shape.bytes);
    if (!done) good = false;
  });
  return good;
}

}  // namespace puna::PUNA_ISA
