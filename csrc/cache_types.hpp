// The types of numbers in the key/value cache. Each says how many bytes a number has, whether groups of 32 have a scale, how a
// vector of numbers is loaded (before scaling) and how up to 32 floats are rounded to numbers and their scale.
//
// float16 and q8_0 store what they cannot hold as their largest number; NaN stays NaN in all of them.
#pragma once

#include "simd.hpp"

namespace puna::PUNA_ISA {

constexpr int kScaleGroup = 32;

inline Vec splat_half(const uint16_t* half) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_set1_epi16(short(*half)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_set1_epi16(short(*half)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(half)));
#else
  return splat(half_to_float(*half));
#endif
}

struct CacheF32 {
  using Number = float;
  static constexpr bool kScaled = false;
  static Vec load(const Number* from) { return puna::PUNA_ISA::load(from); }
  static void round(const float* from, int count, Number* to, uint16_t*) { std::memcpy(to, from, size_t(count) * sizeof *to); }
};

struct CacheF16 {
  using Number = uint16_t;
  static constexpr bool kScaled = false;
  static Vec load(const Number* from) { return load_half(from); }
  static void round(const float* from, int count, Number* to, uint16_t*) {
    for (int i = 0; i < count; i += kLanes) {
      const Vec v = count - i >= kLanes ? puna::PUNA_ISA::load(from + i) : load_first(from + i, count - i);
      store_half(to + i, max(splat(-kLargestHalf), min(splat(kLargestHalf), v)));
    }
  }
};

struct CacheBF16 {
  using Number = uint16_t;
  static constexpr bool kScaled = false;
  static Vec load(const Number* from) {
#if defined(__AVX512F__)
    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
#elif defined(__AVX2__)
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = bit_cast<float>(uint32_t(from[i]) << 16);
    return v;
#endif
  }
  static void round(const float* from, int count, Number* to, uint16_t*) {
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(from[i]);
      const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
      to[i] = uint16_t(is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
};

// Codes of -127 ... 127 times a float16 scale, as in the weights' Q8_0.
struct CacheQ8 {
  using Number = int8_t;
  static constexpr bool kScaled = true;
  static Vec load(const Number* from) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = from[i];
    return v;
#endif
  }
  static void round(const float* from, int count, Number* to, uint16_t* scale) {
    constexpr float kLargest = 127 * kLargestHalf, kSmallestNormal = 0x1p-126f;
    float largest = 0;
    bool is_nan = false;
    for (int i = 0; i < count; ++i) {
      const float magnitude = __builtin_fabsf(from[i]);
      is_nan |= magnitude != magnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    largest = largest > kLargest ? kLargest : largest;
    const float step = largest / 127;
    *scale = is_nan ? 0x7e00 : float_to_half(step);
    const float inverse = step >= kSmallestNormal ? 1 / step : 0;
    for (int i = 0; i < count; ++i) {
      const float clamped = from[i] > kLargest ? kLargest : from[i] < -kLargest ? -kLargest : from[i];
      const float scaled = is_nan ? 0 : clamped * inverse;
      const int whole = int(scaled);
      to[i] = int8_t(whole + int(2 * (scaled - float(whole))));  // halves away from zero
    }
  }
};

}  // namespace puna::PUNA_ISA
