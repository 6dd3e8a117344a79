// Integer dot products of panel codes with int8 activations, for each instruction set. All give the same integers.
//
// Bytes is one vector of kLanes rows x 4 inner values. unpack_low and unpack_high take codes out of it; Dot<codes> then adds
// the products with a broadcast quad of activations to 32-bit sums, a lane each row:
//   partial = start(sum); partial = add(partial, codes, activations) ...; sum = finish(sum, partial)
// with at most 8 additions for nibbles, 4 for bytes and 2 for six bits in between. kSignedDot: signed codes q are taken as q - 128 (or as
// the table's values); otherwise as they are stored, and the caller starts from -128 times the sum of the activations.
#pragma once

#include "panel.hpp"
#include "simd.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace puna::PUNA_ISA {

// Whether bfloat16 weights are multiplied as such, with activations rounded to bfloat16.
#if defined(__AVX512BF16__)
constexpr bool kBfloat16Dot = true;
#else
constexpr bool kBfloat16Dot = false;
#endif

#if defined(__AVX512VNNI__)

using Bytes = __m512i;
constexpr bool kSignedDot = false;

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes splat_quad(const int8_t* p) { return _mm512_set1_epi32(bit_cast<int32_t>(*reinterpret_cast<const int8_t(*)[4]>(p))); }
inline IntVec splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
// The two bits of quad k of four, as bits 4 and 5.
inline Bytes high_bits(Bytes plane, int k) {
  const Bytes moved = k == 0 ? _mm512_slli_epi16(plane, 4) : k == 1 ? _mm512_slli_epi16(plane, 2) : k == 2 ? plane : _mm512_srli_epi16(plane, 2);
  return _mm512_and_si512(moved, _mm512_set1_epi8(0x30));
}
inline Bytes join(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes look_up(Bytes index) {  // table values + 128
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIq4Values));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128))), index);
}
inline Vec load_signed(const int8_t* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_unsigned(const uint8_t* p) {
  return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#if defined(__AVX512BF16__)
// A panel's bfloat16 of two inner values, 16 rows each, as 16 pairs; nothing is read of a second that is beyond `left`.
inline Bytes pair_order() {
  const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_or_si512(rows, _mm512_slli_epi32(_mm512_add_epi32(rows, _mm512_set1_epi32(16)), 16));
}
inline Bytes load_pairs(const uint8_t* p, int64_t left, Bytes order) {
  const Bytes rows = left > 1 ? load_bytes(p) : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_permutexvar_epi16(order, rows);
}
inline Vec add_pair_products(Vec sum, Bytes weights, uint32_t pair) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(weights), bit_cast<__m512bh>(_mm512_set1_epi32(int(pair))));
}
#endif

template <Codes>
struct Dot {
  using Partial = IntVec;
  static Partial start(IntVec sum) { return sum; }
  static Partial add(Partial p, Bytes codes, Bytes activations) { return _mm512_dpbusd_epi32(p, codes, activations); }
  static IntVec finish(IntVec, Partial p) { return p; }
};

#elif defined(__AVX2__)

using Bytes = __m256i;
constexpr bool kSignedDot = true;

inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes splat_quad(const int8_t* p) { return _mm256_set1_epi32(bit_cast<int32_t>(*reinterpret_cast<const int8_t(*)[4]>(p))); }
inline IntVec splat_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Bytes high_bits(Bytes plane, int k) {
  const Bytes moved = k == 0 ? _mm256_slli_epi16(plane, 4) : k == 1 ? _mm256_slli_epi16(plane, 2) : k == 2 ? plane : _mm256_srli_epi16(plane, 2);
  return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
}
inline Bytes join(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes look_up(Bytes index) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIq4Values));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
}
inline Vec load_signed(const int8_t* p) {
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_unsigned(const uint8_t* p) {
  return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// Small codes: pairs of products stay in 16 bits over a whole group (2 x 15 x 127 x 8 for nibbles, 2 x 31 x 127 x 4
// for bytes, 2 x 63 x 127 x 2 for six bits).
template <Codes>
struct Dot {
  using Partial = __m256i;
  static Partial start(IntVec) { return _mm256_setzero_si256(); }
  static Partial add(Partial p, Bytes codes, Bytes activations) {
    return _mm256_add_epi16(p, _mm256_maddubs_epi16(codes, activations));
  }
  static IntVec finish(IntVec sum, Partial p) { return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(1))); }
};
// Signed codes: |code| x (activation with the code's sign). At most 2 x 128 x 127, so a pair just fits 16 bits.
struct SignedDot {
  using Partial = __m256i;
  static Partial start(IntVec sum) { return sum; }
  static Partial add(Partial p, Bytes codes, Bytes activations) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(activations, codes));
    return _mm256_add_epi32(p, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static IntVec finish(IntVec, Partial p) { return p; }
};
template <> struct Dot<Codes::NibbleTable> : SignedDot {};
template <> struct Dot<Codes::SignedBytes> : SignedDot {
  static Partial add(Partial p, Bytes codes, Bytes activations) {
    return SignedDot::add(p, _mm256_xor_si256(codes, _mm256_set1_epi8(-128)), activations);
  }
};

#else

using Bytes = uint8_t __attribute__((vector_size(16)));

inline Bytes load_bytes(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline IntVec splat_int(int32_t x) { return IntVec{x, x, x, x}; }
inline Bytes splat_quad(const int8_t* p) { return bit_cast<Bytes>(splat_int(bit_cast<int32_t>(*reinterpret_cast<const int8_t(*)[4]>(p)))); }
inline Bytes low_nibbles(Bytes v) { return v & 15; }
inline Bytes high_nibbles(Bytes v) { return v >> 4; }
inline Bytes high_bits(Bytes plane, int k) { return (k < 2 ? plane << (4 - 2 * k) : plane >> (2 * k - 4)) & 0x30; }
inline Bytes join(Bytes a, Bytes b) { return a | b; }

#if defined(__ARM_FEATURE_DOTPROD)

constexpr bool kSignedDot = true;

// Four bytes in the low half of a vector.
inline uint8x8_t load_four(const void* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return vreinterpret_u8_u32(vdup_n_u32(bits));
}
inline Bytes look_up(Bytes index) { return vreinterpretq_u8_s8(vqtbl1q_s8(vld1q_s8(kIq4Values), index)); }
inline Vec load_signed(const int8_t* p) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four(p))))));
}
inline Vec load_unsigned(const uint8_t* p) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_four(p))))); }
inline Vec load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

template <Codes C>
struct Dot {
  using Partial = IntVec;
  static Partial start(IntVec sum) { return sum; }
  static Partial add(Partial p, Bytes codes, Bytes activations) {
    if constexpr (C == Codes::SignedBytes) codes ^= 0x80;
    return vdotq_s32(p, vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(activations));
  }
  static IntVec finish(IntVec, Partial p) { return p; }
};

#else

using Words = int16_t __attribute__((vector_size(16)));
constexpr bool kSignedDot = false;

inline Bytes look_up(Bytes index) {  // table values + 128
  uint8_t bytes[16];
  std::memcpy(bytes, &index, 16);
  for (uint8_t& byte : bytes) byte = uint8_t(kIq4Values[byte] + 128);
  return load_bytes(bytes);
}
inline Vec load_signed(const int8_t* p) { return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline Vec load_unsigned(const uint8_t* p) { return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline Vec load_bf16(const uint16_t* p) { return bit_cast<Vec>(IntVec{p[0], p[1], p[2], p[3]} << 16); }

template <Codes>
struct Dot {
  using Partial = IntVec;
  static Partial start(IntVec sum) { return sum; }
  static Partial add(Partial p, Bytes codes, Bytes activations) {
#if defined(__SSE2__)
    const auto even = bit_cast<IntVec>(_mm_madd_epi16(bit_cast<__m128i>(bit_cast<Words>(codes) & 255),
                                                      bit_cast<__m128i>(bit_cast<Words>(activations) << 8 >> 8)));
    const auto odd = bit_cast<IntVec>(_mm_madd_epi16(_mm_srli_epi16(bit_cast<__m128i>(codes), 8),
                                                     bit_cast<__m128i>(bit_cast<Words>(activations) >> 8)));
    return p + even + odd;
#else
    for (int i = 0; i < 16; i++) p[i / 4] += codes[i] * int8_t(activations[i]);
    return p;
#endif
  }
  static IntVec finish(IntVec, Partial p) { return p; }
};

#endif
#endif

}  // namespace puna::PUNA_ISA
