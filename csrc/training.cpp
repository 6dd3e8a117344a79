// Steps of training between the matrix products, and their backward passes, each in one passage through memory. Arithmetic is
// float32; numbers are stored as float32 or bfloat16. A row's result never depends on the other rows.
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int64_t kGrain = 16384;  // numbers for one thread to take at a time

using Bits = uint32_t __attribute__((vector_size(kLanes * 4)));
using HalfBits = uint16_t __attribute__((vector_size(kLanes * 2)));

inline Vec read(const float* p) { return load(p); }

inline Vec read(const uint16_t* p) {
  HalfBits numbers;
  std::memcpy(&numbers, p, sizeof numbers);
  return bit_cast<Vec>(__builtin_convertvector(numbers, Bits) << 16);
}

inline void write(float* p, Vec v) { store(p, v); }

// Rounds to nearest even; NaN stays NaN.
inline void write(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)  // which takes subnormal numbers for 0
  const auto numbers = bit_cast<__m256i>(_mm512_cvtneps_pbh(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), numbers);
#else
  const Bits bits = bit_cast<Bits>(v), magnitude = bits & 0x7fffffff;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const HalfBits numbers = __builtin_convertvector(magnitude > 0x7f800000 ? bits >> 16 | 0x40 : rounded, HalfBits);
  std::memcpy(p, &numbers, sizeof numbers);
#endif
}

// How many lanes of a vector there are numbers for: all of them, as a type so that loops are compiled for it, or an int.
struct All {};

template <class Number>
inline Vec read(const Number* p, All) { return read(p); }

// The other lanes are 0.
template <class Number>
inline Vec read(const Number* p, int lanes) {
  Number all[kLanes] = {};
  std::memcpy(all, p, size_t(lanes) * sizeof *p);
  return read(all);
}

template <class Number>
inline void write(Number* p, Vec v, All) { write(p, v); }

template <class Number>
inline void write(Number* p, Vec v, int lanes) {
  Number all[kLanes];
  write(all, v);
  std::memcpy(p, all, size_t(lanes) * sizeof *p);
}

inline Vec keep(Vec v, All, Vec) { return v; }
inline Vec keep(Vec v, int lanes, Vec other) { return keep_first(v, lanes, other); }

// body(first, lanes) for each vector of [0, count)
template <class Body>
inline void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, All{});
  if (i < count) body(i, int(count - i));
}

template <class Body>
void each_row(ThreadPool& pool, int64_t rows, int64_t columns, const Body& body) {
  pool.run(rows, columns >= kGrain ? 1 : kGrain / columns, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

inline Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(zero() - x)); }

template <class Number>
void norm(ThreadPool& pool, const Number* x, const float* weight, float eps, int64_t tokens, int64_t columns, Number* out,
          float* inverse) {
  each_row(pool, tokens, columns, [=](int64_t t) {
    const Number* row = x + t * columns;
    Number* to = out + t * columns;
    Vec squares = zero();
    each_vector(columns, [&](int64_t i, auto lanes) {
      const Vec v = read(row + i, lanes);
      squares = fma(v, v, squares);
    });
    inverse[t] = 1.0f / __builtin_sqrtf(reduce_add(squares) / float(columns) + eps);
    const Vec scale = splat(inverse[t]);
    each_vector(columns, [&](int64_t i, auto lanes) {
      write(to + i, read(row + i, lanes) * scale * read(weight + i, lanes), lanes);
    });
  });
}

// y = x · i(x) · w with i = (mean(x²) + eps)^-½, so dx = i · (g · w) - x · i³ · mean(g · w · x).
template <class Number>
void norm_backward(ThreadPool& pool, const Number* x, const float* weight, const float* inverse, const Number* gradient,
                   int64_t tokens, int64_t columns, Number* x_gradient) {
  each_row(pool, tokens, columns, [=](int64_t t) {
    const int64_t at = t * columns;
    Vec products = zero();
    each_vector(columns, [&](int64_t i, auto lanes) {
      products = fma(read(gradient + at + i, lanes) * read(weight + i, lanes), read(x + at + i, lanes), products);
    });
    const float i1 = inverse[t];
    const Vec scale = splat(i1), inner = splat(-reduce_add(products) / float(columns) * i1 * i1 * i1);
    each_vector(columns, [&](int64_t i, auto lanes) {
      const Vec scaled = read(gradient + at + i, lanes) * read(weight + i, lanes) * scale;
      write(x_gradient + at + i, fma(read(x + at + i, lanes), inner, scaled), lanes);
    });
  });
}

template <class Number>
void rotate(ThreadPool& pool, const Number* x, const float* cosines, const float* sines, bool back, int64_t tokens,
            int64_t heads, int64_t half, Number* out) {
  const Vec sign = splat(back ? -1.0f : 1.0f);
  each_row(pool, tokens, heads * 2 * half, [=](int64_t t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (t * heads + h) * 2 * half;
      each_vector(half, [&](int64_t i, auto lanes) {
        const Vec a = read(x + at + i, lanes), b = read(x + at + half + i, lanes);
        const Vec c = read(cosines + t * half + i, lanes), s = read(sines + t * half + i, lanes) * sign;
        write(out + at + i, a * c - b * s, lanes);
        write(out + at + half + i, b * c + a * s, lanes);
      });
    }
  });
}

// Numbers are combined one by one; a thread takes whole vectors but the last.
template <class Number>
void gate(ThreadPool& pool, const Number* gate, const Number* up, int64_t count, Number* out) {
  pool.run(count, kGrain, [=](int64_t begin, int64_t end, int) {
    each_vector(end - begin, [=](int64_t i, auto lanes) {
      const Vec g = read(gate + begin + i, lanes);
      write(out + begin + i, g * sigmoid(g) * read(up + begin + i, lanes), lanes);
    });
  });
}

// silu'(g) = s + g · s · (1 - s), s the sigmoid of g.
template <class Number>
void gate_backward(ThreadPool& pool, const Number* gate, const Number* up, const Number* gradient, int64_t count,
                   Number* gate_gradient, Number* up_gradient) {
  pool.run(count, kGrain, [=](int64_t begin, int64_t end, int) {
    each_vector(end - begin, [=](int64_t i, auto lanes) {
      const int64_t at = begin + i;
      const Vec g = read(gate + at, lanes), u = read(up + at, lanes), d = read(gradient + at, lanes);
      const Vec s = sigmoid(g), silu = g * s;
      write(up_gradient + at, d * silu, lanes);
      write(gate_gradient + at, d * u * fma(silu, splat(1.0f) - s, s), lanes);
    });
  });
}

// Replaces a row of logits by weight · (softmax - one-hot of the target), if asked; returns weight · -log softmax[target].
template <class Number>
float cross_entropy_row(Number* logits, int64_t target, float weight, int64_t vocabulary, bool gradients) {
  Vec tops = splat(-kInfinity);
  each_vector(vocabulary, [&](int64_t i, auto lanes) {
    const Vec v = read(logits + i, lanes);
    tops = max(tops, keep(v, lanes, tops));
  });
  const float top = reduce_max(tops);
  Vec sums = zero();
  each_vector(vocabulary, [&](int64_t i, auto lanes) {
    const Vec e = exp(read(logits + i, lanes) - splat(top));
    sums = sums + keep(e, lanes, zero());
  });
  const float total = reduce_add(sums);
  const float chosen = reduce_add(read(logits + target, 1));
  if (gradients) {
    const Vec scale = splat(weight / total);
    each_vector(vocabulary, [&](int64_t i, auto lanes) {
      write(logits + i, exp(read(logits + i, lanes) - splat(top)) * scale, lanes);
    });
    write(logits + target, splat((__builtin_expf(chosen - top) / total - 1.0f) * weight), 1);
  }
  return weight * (__builtin_logf(total) - (chosen - top));
}

// Scores of a row whose first `seen` keys are visible -> weights, 0 beyond these. Scores are overwritten.
template <class Number>
void softmax_row(float* scores, float scale, int64_t seen, int64_t keys, Number* out) {
  Vec tops = splat(-kInfinity);
  each_vector(seen, [&](int64_t i, auto lanes) {
    const Vec v = read(scores + i, lanes);
    tops = max(tops, keep(v, lanes, tops));
  });
  const Vec top = splat(reduce_max(tops)), factor = splat(scale);
  Vec sums = zero();
  each_vector(seen, [&](int64_t i, auto lanes) {
    const Vec e = exp((read(scores + i, lanes) - top) * factor);
    write(scores + i, e, lanes);
    sums = sums + keep(e, lanes, zero());
  });
  const Vec inverse = splat(1.0f / reduce_add(sums));
  each_vector(seen, [&](int64_t i, auto lanes) {
    write(out + i, read(scores + i, lanes) * inverse, lanes);
  });
  std::memset(out + seen, 0, size_t(keys - seen) * sizeof *out);
}

// dS = scale · P ∘ (dP - Σ P ∘ dP)
template <class Number>
void softmax_row_backward(const Number* weights, float scale, int64_t keys, Number* gradients) {
  Vec products = zero();
  each_vector(keys, [&](int64_t i, auto lanes) { products = fma(read(weights + i, lanes), read(gradients + i, lanes), products); });
  const Vec mean = splat(reduce_add(products)), factor = splat(scale);
  each_vector(keys, [&](int64_t i, auto lanes) {
    write(gradients + i, read(weights + i, lanes) * factor * (read(gradients + i, lanes) - mean), lanes);
  });
}

template <class Number>
void cross_entropy(ThreadPool& pool, Number* logits, const int64_t* targets, const float* weights, int64_t rows,
                   int64_t vocabulary, bool gradients, float* losses) {
  each_row(pool, rows, vocabulary, [=](int64_t row) {
    losses[row] = cross_entropy_row(logits + row * vocabulary, targets[row], weights[row], vocabulary, gradients);
  });
}

template <class Number>
void causal_softmax(ThreadPool& pool, float* scores, float scale, int64_t count, int64_t queries, int64_t heads,
                    int64_t keys, Number* weights) {
  each_row(pool, count * queries * heads, keys, [=](int64_t row) {
    const int64_t query = row / heads % queries;
    softmax_row(scores + row * keys, scale, keys - queries + query + 1, keys, weights + row * keys);
  });
}

template <class Number>
void softmax_backward(ThreadPool& pool, const Number* weights, float scale, int64_t rows, int64_t keys, Number* gradients) {
  each_row(pool, rows, keys, [=](int64_t row) { softmax_row_backward(weights + row * keys, scale, keys, gradients + row * keys); });
}

template <class Number>
const TrainingKernels<Number>* table() {
  static constexpr TrainingKernels<Number> kernels = {
      norm<Number>, norm_backward<Number>, rotate<Number>, gate<Number>, gate_backward<Number>, cross_entropy<Number>,
      causal_softmax<Number>, softmax_backward<Number>};
  return &kernels;
}

}  // namespace

const TrainingKernels<float>* float32_training() { return table<float>(); }
const TrainingKernels<uint16_t>* bfloat16_training() { return table<uint16_t>(); }

}  // namespace puna::PUNA_ISA
