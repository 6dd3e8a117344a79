// Vectors of floats, as wide as the instruction set that this translation unit is compiled for. Everything is inline inside
// namespace puna::PUNA_ISA, so that code for one instruction set never leaks into another.
//
// `+ - *` on Vec are the compiler's element-wise operators. The sources are compiled without floating-point contraction: a
// multiply-add is fused only where fma() is written, so the same expression gives the same bits wherever it stands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define PUNA_UNROLL _Pragma("unroll")
#else
#define PUNA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace puna::PUNA_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargestHalf = 65504.0f;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// IEEE half precision to single, exactly. The exponent is moved by a multiplication, which also normalises subnormals.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(special | uint32_t(half & 0x8000) << 16);
}

// Single to half precision, rounding to nearest even; NaN stays NaN.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude < 0x38800000) {  // subnormal half: adding 0.5 lets the hardware round at 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    half = half > 0x7c00 ? 0x7c00 : half;
  }
  return uint16_t(half | (bits >> 16 & 0x8000));
}

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }
// The first `count` < kLanes elements; the others are zero and are not read or written.
inline Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void store_first(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
// v with all but the first `count` lanes replaced.
inline Vec keep_first(Vec v, int count, Vec other) { return _mm512_mask_blend_ps(first_lanes(count), other, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Where an operand is NaN, the second one is returned.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
inline Vec load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_half(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec zero_where_less(Vec x, Vec limit, Vec v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}
// Bit i is set where lane i of x is >= that of the bound.
inline uint32_t at_least(Vec x, Vec bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ); }
using IntVec = __m512i;
inline IntVec round_to_int(Vec v) { return _mm512_cvtps_epi32(v); }
inline Vec to_float(IntVec v) { return _mm512_cvtepi32_ps(v); }
inline Vec power_of_two(IntVec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline void store_first(float* p, Vec v, int count) { _mm256_maskstore_ps(p, first_lanes(count), v); }
inline Vec keep_first(Vec v, int count, Vec other) {
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(first_lanes(count)));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline float reduce_add(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline Vec load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_half(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec zero_where_less(Vec x, Vec limit, Vec v) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), v); }
inline uint32_t at_least(Vec x, Vec bound) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_GE_OQ))); }
using IntVec = __m256i;
inline IntVec round_to_int(Vec v) { return _mm256_cvtps_epi32(v); }
inline Vec to_float(IntVec v) { return _mm256_cvtepi32_ps(v); }
inline Vec power_of_two(IntVec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

#else  // four lanes in the compiler's generic vectors, which become SSE2 or NEON; instructions by name where those don't reach

using Vec = float __attribute__((vector_size(16)));
using IntVec = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Vec zero() { return Vec{}; }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec load_first(const float* p, int count) {
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, Vec v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
inline Vec keep_first(Vec v, int count, Vec other) {
  return IntVec{0, 1, 2, 3} < count ? v : other;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
inline Vec zero_where_less(Vec x, Vec limit, Vec v) { return x < limit ? Vec{} : v; }
inline uint32_t at_least(Vec x, Vec bound) {
  const IntVec bits = (x >= bound) & IntVec{1, 2, 4, 8};
  return uint32_t((bits[0] | bits[1]) | (bits[2] | bits[3]));
}
inline Vec to_float(IntVec v) { return __builtin_convertvector(v, Vec); }
inline Vec power_of_two(IntVec n) { return bit_cast<Vec>((n + 127) << 23); }

#if defined(__ARM_FEATURE_DOTPROD)
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_half(uint16_t* p, Vec v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline IntVec round_to_int(Vec v) { return vcvtnq_s32_f32(v); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec load_half(const uint16_t* p) {
  using Halves = uint16_t __attribute__((vector_size(8)));
  using Words = uint32_t __attribute__((vector_size(16)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Words bits = __builtin_convertvector(halves, Words);
  const Words magnitude = (bits & 0x7fff) << 13;
  const Words finite = bit_cast<Words>(bit_cast<Vec>(magnitude) * 0x1p112f);
  const Words special = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return bit_cast<Vec>(special | (bits & 0x8000) << 16);
}
inline void store_half(uint16_t* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
}
inline IntVec round_to_int(Vec v) {
  const Vec shift = splat(0x1.8p23f);  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  return bit_cast<IntVec>(v + shift) - bit_cast<IntVec>(shift);
}
#endif

#endif

// e^x to about one unit in the last place; 0 below -87.3 (where the result is subnormal), at most e^88, NaN for NaN.
// x = n ln 2 + r, e^r = 1 + r + r^2 P(r): P minimises the relative error over |r| <= ln 2 / 2 (Remez), 3e-9.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.3f);
  const Vec clamped = max(lowest, min(splat(88.0f), x));
  const IntVec n = round_to_int(clamped * splat(1.44269504f));
  const Vec whole = to_float(n);
  Vec r = fma(whole, splat(-0.693359375f), clamped);  // ln 2 in two parts, the first of nine bits
  r = fma(whole, splat(2.12194440e-4f), r);
  Vec p = fma(splat(0.00138144670593f), r, splat(0.00836878041118f));
  p = fma(p, r, splat(0.0416683942109f));
  p = fma(p, r, splat(0.166665201078f));
  p = fma(p, r, splat(0.499999934125f));
  const Vec series = fma(p, r * r, r) + splat(1.0f);
  return zero_where_less(x, lowest, series * power_of_two(n));
}

// Call body(integral constant) with the number of rows that is left, at most Most, so that a kernel's tile is known when
// it is compiled: visit_count<6>(rows, [&](auto count) { kernel<count.value>(...); }).
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int Most, typename Body>
inline void visit_count(int64_t count, const Body& body) {
  if constexpr (Most == 1) {
    body(Count<1>{});
  } else if (count >= Most) {
    body(Count<Most>{});
  } else {
    visit_count<Most - 1>(count, body);
  }
}

}  // namespace puna::PUNA_ISA
