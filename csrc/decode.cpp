// Encoded rows to float32, bit for bit what the numpy codecs of puna/tensor give. Used for embedding lookup and as the
// fallback of types without a kernel of their own, so it is kept plain; the compiler vectorises the loops over a block.
// Layouts: ggml's block structures (ggml-common.h).
#include "block_types.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};  // IQ4_NL, IQ4_XS

template <typename T>
T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

float half_at(const uint8_t* p) { return half_to_float(read<uint16_t>(p)); }

// Fields of Width bits out of Bytes bytes. Each run of Run bytes holds 8 / Width runs of fields: first the lowest bits of
// every byte of the run, then the next higher ones. codes[i] |= field << shift.
template <int Width, int Run, int Bytes>
void unpack(const uint8_t* packed, uint8_t* codes, int shift = 0) {
  for (int start = 0; start < Bytes; start += Run)
    for (int bit = 0; bit < 8; bit += Width)
      for (int i = 0; i < Run; ++i) *codes++ |= uint8_t((packed[start + i] >> bit & ((1 << Width) - 1)) << shift);
}

// out = scale * (code - offset), one scale for each Group codes.
template <int Group, int Groups, typename Code>
void scaled(const Code* codes, int offset, const float* scales, float* out) {
  for (int g = 0; g < Groups; ++g)
    for (int i = 0; i < Group; ++i) out[g * Group + i] = scales[g] * float(codes[g * Group + i] - offset);
}

// out = scale * code + low, one scale and low for each Group codes.
template <int Group, int Groups>
void affine(const uint8_t* codes, const float* scales, const float* lows, float* out) {
  for (int g = 0; g < Groups; ++g)
    for (int i = 0; i < Group; ++i) out[g * Group + i] = scales[g] * float(codes[g * Group + i]) + lows[g];
}

void decode_f32(const uint8_t* block, float* out) { *out = read<float>(block); }

void decode_f16(const uint8_t* block, float* out) { *out = half_at(block); }

void decode_bf16(const uint8_t* block, float* out) { *out = bit_cast<float>(uint32_t(read<uint16_t>(block)) << 16); }

void decode_q4_0(const uint8_t* block, float* out) {
  uint8_t codes[32] = {};
  unpack<4, 16, 16>(block + 2, codes);
  const float scale = half_at(block);
  scaled<32, 1>(codes, 8, &scale, out);
}

void decode_q4_1(const uint8_t* block, float* out) {
  uint8_t codes[32] = {};
  unpack<4, 16, 16>(block + 4, codes);
  const float scale = half_at(block), low = half_at(block + 2);
  affine<32, 1>(codes, &scale, &low, out);
}

void decode_q5_0(const uint8_t* block, float* out) {
  uint8_t codes[32] = {};
  unpack<4, 16, 16>(block + 6, codes);
  unpack<1, 1, 4>(block + 2, codes, 4);
  const float scale = half_at(block);
  scaled<32, 1>(codes, 16, &scale, out);
}

void decode_q5_1(const uint8_t* block, float* out) {
  uint8_t codes[32] = {};
  unpack<4, 16, 16>(block + 8, codes);
  unpack<1, 1, 4>(block + 4, codes, 4);
  const float scale = half_at(block), low = half_at(block + 2);
  affine<32, 1>(codes, &scale, &low, out);
}

void decode_q8_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  scaled<32, 1>(reinterpret_cast<const int8_t*>(block + 2), 0, &scale, out);
}

void decode_q2_k(const uint8_t* block, float* out) {
  uint8_t codes[256] = {};
  unpack<2, 32, 64>(block + 16, codes);
  const float scale = half_at(block + 80), low = half_at(block + 82);
  float scales[16], lows[16];
  for (int g = 0; g < 16; ++g) {
    scales[g] = scale * float(block[g] & 15);
    lows[g] = -(low * float(block[g] >> 4));
  }
  affine<16, 16>(codes, scales, lows, out);
}

void decode_q3_k(const uint8_t* block, float* out) {
  uint8_t codes[256] = {}, fields[16] = {};
  unpack<2, 32, 64>(block + 32, codes);
  unpack<1, 32, 32>(block, codes, 2);
  unpack<4, 8, 8>(block + 96, fields);
  unpack<2, 4, 4>(block + 104, fields, 4);
  const float scale = half_at(block + 108);
  float scales[16];
  for (int g = 0; g < 16; ++g) scales[g] = scale * float(fields[g] - 32);
  scaled<16, 16>(codes, 4, scales, out);
}

// The scales and lows of Q4_K and Q5_K. Twelve bytes: a[4] and b[4] hold scales and minima 0-3 in their low 6 bits; c[4]
// holds the low 4 bits of scales (low nibble) and minima (high nibble) 4-7, whose top 2 bits are those of a and b.
void six_bit_scales(const uint8_t* block, float* scales, float* lows) {
  const float scale = half_at(block), low = half_at(block + 2);
  const uint8_t *a = block + 4, *b = block + 8, *c = block + 12;
  for (int g = 0; g < 4; ++g) {
    scales[g] = scale * float(a[g] & 63);
    lows[g] = -(low * float(b[g] & 63));
    scales[g + 4] = scale * float((c[g] & 15) | a[g] >> 6 << 4);
    lows[g + 4] = -(low * float(c[g] >> 4 | b[g] >> 6 << 4));
  }
}

void decode_q4_k(const uint8_t* block, float* out) {
  uint8_t codes[256] = {};
  unpack<4, 32, 128>(block + 16, codes);
  float scales[8], lows[8];
  six_bit_scales(block, scales, lows);
  affine<32, 8>(codes, scales, lows, out);
}

void decode_q5_k(const uint8_t* block, float* out) {
  uint8_t codes[256] = {};
  unpack<4, 32, 128>(block + 48, codes);
  unpack<1, 32, 32>(block + 16, codes, 4);
  float scales[8], lows[8];
  six_bit_scales(block, scales, lows);
  affine<32, 8>(codes, scales, lows, out);
}

void decode_q6_k(const uint8_t* block, float* out) {
  uint8_t codes[256] = {};
  unpack<4, 64, 128>(block, codes);
  unpack<2, 32, 64>(block + 128, codes, 4);
  const float scale = half_at(block + 208);
  float scales[16];
  for (int g = 0; g < 16; ++g) scales[g] = scale * float(int8_t(block[192 + g]));
  scaled<16, 16>(codes, 32, scales, out);
}

void decode_q8_k(const uint8_t* block, float* out) {
  const float scale = read<float>(block);
  scaled<256, 1>(reinterpret_cast<const int8_t*>(block + 4), 0, &scale, out);
}

template <int Groups>
void look_up_levels(const uint8_t* packed, const float* scales, float* out) {
  uint8_t codes[Groups * 32] = {};
  unpack<4, 16, Groups * 16>(packed, codes);
  for (int i = 0; i < Groups * 32; ++i) out[i] = scales[i / 32] * float(kLevels[codes[i]]);
}

void decode_iq4_nl(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  look_up_levels<1>(block + 2, &scale, out);
}

void decode_iq4_xs(const uint8_t* block, float* out) {
  uint8_t fields[8] = {};
  unpack<4, 1, 4>(block + 4, fields);
  unpack<2, 1, 2>(block + 2, fields, 4);
  const float scale = half_at(block);
  float scales[8];
  for (int g = 0; g < 8; ++g) scales[g] = scale * float(fields[g] - 32);
  look_up_levels<8>(block + 8, scales, out);
}

using Decoder = void (*)(const uint8_t* block, float* out);

Decoder decoder_of(int type) {
  switch (type) {
    case kF32: return decode_f32;
    case kF16: return decode_f16;
    case kBF16: return decode_bf16;
    case kQ4_0: return decode_q4_0;
    case kQ4_1: return decode_q4_1;
    case kQ5_0: return decode_q5_0;
    case kQ5_1: return decode_q5_1;
    case kQ8_0: return decode_q8_0;
    case kQ2_K: return decode_q2_k;
    case kQ3_K: return decode_q3_k;
    case kQ4_K: return decode_q4_k;
    case kQ5_K: return decode_q5_k;
    case kQ6_K: return decode_q6_k;
    case kQ8_K: return decode_q8_k;
    case kIQ4_NL: return decode_iq4_nl;
    case kIQ4_XS: return decode_iq4_xs;
    default: return nullptr;
  }
}

}  // namespace

// out[i] = row index[i] of source (row i when index is null), as [count, columns]. The type must be one of block_types.hpp.
void decode_rows(ThreadPool& pool, int type, int64_t columns, const uint8_t* source, const int32_t* index, int64_t count,
                 float* out) {
  const BlockShape shape = block_shape(type);
  const Decoder decode = decoder_of(type);
  const int64_t blocks = columns / shape.numbers;
  const int64_t grain = columns >= 8192 ? 1 : 8192 / columns;
  pool.run(count, grain, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* row = source + (index ? index[i] : i) * blocks * shape.bytes;
      for (int64_t b = 0; b < blocks; ++b) decode(row + b * shape.bytes, out + i * columns + b * shape.numbers);
    }
  });
}

}  // namespace puna::PUNA_ISA
