// The operations between the linear layers. A row's result never depends on the other rows: each is computed by one thread
// in one fixed order.
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int64_t kGrain = 16384;  // numbers for one thread to take at a time
constexpr double kPi = 3.14159265358979311600, kPiLow = 1.22464679914735317723e-16;  // together pi to twice float64's digits

int64_t rows_at_once(int64_t columns) { return columns >= kGrain ? 1 : kGrain / columns; }

float sum_of_squares(const float* x, int64_t columns) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= columns; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kLanes);
      sums[j] = fma(v, v, sums[j]);
    }
  for (; i < columns; i += kLanes) {
    const Vec v = columns - i >= kLanes ? load(x + i) : load_first(x + i, int(columns - i));
    sums[0] = fma(v, v, sums[0]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

// x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).
void rms_norm(ThreadPool& pool, const float* x, const float* weight, float eps, int64_t tokens, int64_t columns, float* out) {
  pool.run(tokens, rows_at_once(columns), [=](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = x + t * columns;
      float* to = out + t * columns;
      const Vec scale = splat(1.0f / __builtin_sqrtf(sum_of_squares(row, columns) / float(columns) + eps));
      int64_t i = 0;
      for (; i + kLanes <= columns; i += kLanes) store(to + i, load(row + i) * scale * load(weight + i));
      if (const int rest = int(columns - i); rest > 0)
        store_first(to + i, load_first(row + i, rest) * scale * load_first(weight + i, rest), rest);
    }
  });
}

// Cosine and sine of position x inverse frequency, the product in float32, times `scale`: [T, half]. A token's inverse frequencies
// lie `stride` after the last one's, 0 where all have the same. The arithmetic between is float64: one step of argument reduction
// (Cody & Waite 1980) holds for every float32 position, and Taylor's series to a quarter turn's eleventh power for every float32.
void rope_angles(ThreadPool& pool, const int32_t* positions, const float* inverse_frequencies, int64_t stride, float scale,
                 int64_t tokens, int64_t half, float* cosines, float* sines) {
  pool.run(tokens, rows_at_once(8 * half), [=](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float position = float(positions[t]);
      const float* frequencies = inverse_frequencies + t * stride;
      float *cosine_row = cosines + t * half, *sine_row = sines + t * half;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(position * frequencies[i]);
        const double turns = __builtin_nearbyint(angle * (2 / kPi));
        const double x = __builtin_fma(turns, -kPiLow / 2, __builtin_fma(turns, -kPi / 2, angle)), xx = x * x;
        const double sine = x * (1 + xx * (-1.0 / 6 + xx * (1.0 / 120 + xx * (-1.0 / 5040 + xx * (1.0 / 362880 - xx / 39916800)))));
        const double cosine =
            1 + xx * (-0.5 + xx * (1.0 / 24 + xx * (-1.0 / 720 + xx * (1.0 / 40320 + xx * (-1.0 / 3628800 + xx / 479001600)))));
        const int32_t quarter = int32_t(turns);
        const double first = quarter & 1 ? sine : cosine, second = quarter & 1 ? cosine : sine;
        cosine_row[i] = float((quarter + 1) & 2 ? -first : first) * scale;
        sine_row[i] = float(quarter & 2 ? -second : second) * scale;
      }
    }
  });
}

// Rotates the pairs (i, i + head_dim / 2) of every head of x [T, heads * head_dim], in place; angles are [T, head_dim / 2].
void rope(ThreadPool& pool, float* x, const float* cosines, const float* sines, int64_t tokens, int heads, int head_dim) {
  const int half = head_dim / 2;
  const int64_t columns = int64_t(heads) * head_dim;
  pool.run(tokens, rows_at_once(columns), [=](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float *cosine = cosines + t * half, *sine = sines + t * half;
      for (float* first = x + t * columns; first < x + (t + 1) * columns; first += head_dim) {
        float* second = first + half;
        int i = 0;
        for (; i + kLanes <= half; i += kLanes) {
          const Vec a = load(first + i), b = load(second + i), c = load(cosine + i), s = load(sine + i);
          store(first + i, a * c - b * s);
          store(second + i, b * c + a * s);
        }
        if (const int rest = half - i; rest > 0) {
          const Vec a = load_first(first + i, rest), b = load_first(second + i, rest);
          const Vec c = load_first(cosine + i, rest), s = load_first(sine + i, rest);
          store_first(first + i, a * c - b * s, rest);
          store_first(second + i, b * c + a * s, rest);
        }
      }
    }
  });
}

// silu(gate) * up (Shazeer 2020); out may be either of them.
void swiglu(ThreadPool& pool, const float* gate, const float* up, int64_t tokens, int64_t columns, float* out) {
  const auto combine = [](Vec g, Vec u) { return g / (splat(1.0f) + exp(zero() - g)) * u; };
  pool.run(tokens * columns, kGrain, [=](int64_t begin, int64_t end, int) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, combine(load(gate + i), load(up + i)));
    if (const int rest = int(end - i); rest > 0)
      store_first(out + i, combine(load_first(gate + i, rest), load_first(up + i, rest)), rest);
  });
}

}  // namespace puna::PUNA_ISA
