// Scales that lose least, for as many groups of numbers as a vector has lanes: puna/tensor/fit.py, which explains the search, bit
// for bit. Each lane adds up its group from first to last, so sums need no order of their own.
#pragma once

#include "simd.hpp"

namespace puna::PUNA_ISA {

using Lanes = float __attribute__((vector_size(kLanes * 4)));
using Mask = int32_t __attribute__((vector_size(kLanes * 4)));

constexpr float kTiny = 1e-30f;
constexpr float kRound = 0x1.8p23f;
constexpr int kTrials = 10;  // on either side of the obvious scale
constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline Lanes lanes(float x) { return Lanes{} + x; }
inline Lanes choose(Mask where, Lanes a, Lanes b) { return where ? a : b; }
inline Lanes magnitude(Lanes x) { return bit_cast<Lanes>(bit_cast<Mask>(x) & 0x7fffffff); }
inline Lanes divide(Lanes a, Lanes b) { return choose(magnitude(b) > lanes(kTiny), a / b, Lanes{}); }
inline Lanes root(Lanes x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
inline Lanes clamp(Lanes x, float low, float high) {
  x = choose(x > lanes(low), x, lanes(low));
  return choose(x < lanes(high), x, lanes(high));
}
// To the nearest whole number within [low, high], ties to even.
inline Lanes whole(Lanes x, float low, float high) { return (clamp(x, low, high) + kRound) - kRound; }
inline float whole(float x, float low, float high) {
  x = x > low ? x : low;
  x = x < high ? x : high;
  return (x + kRound) - kRound;
}
inline float reciprocal(float x) { return x != 0 ? 1.0f / x : 0.0f; }

// Number i of kLanes groups of `size` numbers that follow each other.
inline void transpose(const float* x, int size, Lanes* out) {
  for (int i = 0; i < size; ++i) {
    float column[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) column[lane] = x[lane * size + i];
    std::memcpy(&out[i], column, sizeof column);
  }
}

inline Lanes affine_error(Lanes total, Lanes first, Lanes second, Lanes q, Lanes qq, Lanes qx, Lanes scale, Lanes low) {
  const Lanes linear = scale * qx + low * first;
  const Lanes square = scale * scale * qq + scale * low * q * 2.0f + low * low * total;
  return second - linear * 2.0f + square;
}

template <int Size>
inline void affine_fit(const Lanes* x, const Lanes* weight, int steps, Lanes& best_scale, Lanes& minimum) {
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

// The scale by which code_of(x / scale) explains most, where the number of largest magnitude gets about a code of end_of(0 … trials - 1).
template <int Size, class EndOf, class CodeOf>
inline Lanes signed_fit(const Lanes* x, const Lanes* weight, int trials, const EndOf& end_of, const CodeOf& code_of) {
  Lanes largest = x[0];
  for (int i = 1; i < Size; ++i) largest = choose(magnitude(x[i]) > magnitude(largest), x[i], largest);
  Lanes best_scale{}, best_gain{};
  for (int trial = 0; trial < trials; ++trial) {
    const Lanes inverse = divide(lanes(end_of(trial)), largest);
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
inline Lanes symmetric_fit(const Lanes* x, const Lanes* weight, int half) {
  const float low = float(-half), high = float(half - 1);
  const auto end_of = [=](int trial) { return low - float(trial - 9) * 0.1f; };
  return signed_fit<Size>(x, weight, 19, end_of, [=](Lanes scaled) { return whole(scaled, low, high); });
}

template <int Size>
inline Lanes whole_fit(const Lanes* x, const Lanes* weight, int most) {
  const float high = float(most);
  const auto end_of = [=](int trial) { return high - float(trial - kTrials) * 0.1f; };
  return signed_fit<Size>(x, weight, 2 * kTrials + 1, end_of, [=](Lanes scaled) { return whole(scaled, 0.0f, high); });
}

inline float middle(int i) { return (kLevels[i + 1] + kLevels[i]) * 0.5f; }

// The largest number at either end of the levels, which are not symmetric; its errors count more than those of small ones.
template <int Size>
inline Lanes level_fit(const Lanes* x, const Lanes* importance) {
  Lanes squares{}, weight[Size];
  for (int i = 0; i < Size; ++i) squares += x[i] * x[i];
  squares = squares * (2.0f / Size);
  for (int i = 0; i < Size; ++i) weight[i] = importance[i] * root(squares + x[i] * x[i]);
  constexpr int kSteps = 2 * kTrials + 1;
  const auto end_of = [](int trial) {
    return trial < kSteps ? kLevels[0] - float(trial - kTrials) * 1.5f : kLevels[15] - float(trial - kSteps - kTrials) * 1.5f;
  };
  return signed_fit<Size>(x, weight, 2 * kSteps, end_of, [](Lanes scaled) {
    Lanes level = lanes(kLevels[0]);
    for (int i = 0; i < 15; ++i) level += choose(scaled > lanes(middle(i)), lanes(kLevels[i + 1] - kLevels[i]), Lanes{});
    return level;
  });
}

}  // namespace puna::PUNA_ISA
