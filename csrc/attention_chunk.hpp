// Attention of some rows (a token's query under one head) over one chunk of keys and values: scores, their exponentials relative
// to the chunk's maximum, and the weighted sums of values. attention.cpp says where chunks come from and how they are merged.
//
// A row's result is always the same sequence of operations: over head_dim for a score, over the keys of a chunk for a sum. It
// depends neither on the rows beside it nor on whether the numbers were expanded to float32 before.
#pragma once

#include "cache_types.hpp"
#include "kernels.hpp"

namespace puna::PUNA_ISA {

constexpr int kChunkKeys = 256;
constexpr int kMaxChunkBlocks = kChunkKeys;  // blocks of one key

// Register tiles: rows times vectors of accumulators.
#if defined(__AVX512F__)
constexpr int kScoreRows = 12, kScoreWidth = 2, kValueRows = 6, kValueWidth = 4;
#elif defined(__AVX2__)
constexpr int kScoreRows = 6, kScoreWidth = 2, kValueRows = 6, kValueWidth = 2;
#else
constexpr int kScoreRows = 4, kScoreWidth = 2, kValueRows = 4, kValueWidth = 2;
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// What follows from the shapes.
struct Geometry {
  int group;  // query heads of one key/value head
  int block_size, head_dim;
  int key_stride, value_stride;
  int chunk_blocks, chunk_keys;
  int score_stride;    // floats of one row's scores of a chunk
  int partial_stride;  // floats of one row's partial result: sums [value_stride], maximum, total

  explicit Geometry(const AttendArgs& args)
      : group(args.heads / args.layout->kv_heads),
        block_size(int(args.layout->block_size)),
        head_dim(args.layout->head_dim),
        key_stride(args.layout->key_stride),
        value_stride(args.layout->value_stride),
        chunk_blocks(int(max_of(1, kChunkKeys / block_size))),
        chunk_keys(chunk_blocks * block_size),
        score_stride(chunk_blocks * key_stride),
        partial_stride(value_stride + 16) {}
};

// The numbers of one block for one key/value head.
template <class Type>
struct HeadPart {
  const typename Type::Number *keys, *values;
  const uint16_t *key_scales, *value_scales;

  const uint16_t* key_scale(const Geometry& g, int dimension) const { return key_scales + dimension / kScaleGroup * g.key_stride; }
  const uint16_t* value_scale(const Geometry& g, int key) const { return value_scales + int64_t(key) * (g.head_dim / kScaleGroup); }
};

template <class Type>
HeadPart<Type> head_part(const CacheLayout& layout, const uint8_t* part) {
  using Number = typename Type::Number;
  return {reinterpret_cast<const Number*>(part), reinterpret_cast<const Number*>(part + layout.values),
          reinterpret_cast<const uint16_t*>(part + layout.key_scales), reinterpret_cast<const uint16_t*>(part + layout.value_scales)};
}

// Asks for `count` numbers, into the second-level cache: more such requests are under way at once than into the first.
template <class Number>
void prefetch(const Number* from, int count) {
  constexpr int kLine = 64 / sizeof(Number);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// Scores of Rows queries against Width vectors of keys of one block. Meanwhile the numbers at `ahead` are fetched.
template <int Rows, int Width, class Type>
void score_keys(const Geometry& g, const float* queries, const HeadPart<Type>& part, int first, const typename Type::Number* ahead,
                float* scores) {
  Vec sums[Rows][Width], scale[Width] = {};
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) sums[r][w] = zero();
  for (int d = 0; d < g.head_dim; ++d) {
    prefetch(ahead + d * g.key_stride, Width * kLanes);
    if constexpr (Type::kScaled)
      if (d % kScaleGroup == 0)
#pragma GCC unroll 4
        for (int w = 0; w < Width; ++w) scale[w] = load_half(part.key_scale(g, d) + first + w * kLanes);
    Vec key[Width];
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) {
      key[w] = Type::load(part.keys + d * g.key_stride + first + w * kLanes);
      if constexpr (Type::kScaled) key[w] = key[w] * scale[w];
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec query = splat(queries[r * g.head_dim + d]);
#pragma GCC unroll 4
      for (int w = 0; w < Width; ++w) sums[r][w] = fma(query, key[w], sums[r][w]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) store(scores + r * g.score_stride + w * kLanes, sums[r][w]);
}

// Sums of values weighted by the exponentials of Rows rows, over `keys` keys and Width vectors of dimensions.
template <int Rows, int Width, class Type>
void sum_values(const Geometry& g, const float* weights, const HeadPart<Type>* parts, int keys, int dimension, float* partial) {
  Vec sums[Rows][Width];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) sums[r][w] = zero();
  for (int done = 0; done < keys; done += g.block_size, ++parts, weights += g.key_stride) {
    const int count = int(min_of(g.block_size, keys - done));
    const typename Type::Number* ahead = parts[done + count < keys ? 1 : 0].values + dimension;
    for (int i = 0; i < count; ++i) {
      prefetch(ahead + int64_t(i) * g.value_stride, Width * kLanes);
      Vec value[Width];
#pragma GCC unroll 4
      for (int w = 0; w < Width; ++w) {
        value[w] = Type::load(parts->values + int64_t(i) * g.value_stride + dimension + w * kLanes);
        if constexpr (Type::kScaled)
          value[w] = value[w] * splat_half(parts->value_scale(g, i) + (dimension + w * kLanes) / kScaleGroup);
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Vec weight = splat(weights[r * g.score_stride + i]);
#pragma GCC unroll 4
        for (int w = 0; w < Width; ++w) sums[r][w] = fma(weight, value[w], sums[r][w]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) store(partial + r * g.partial_stride + dimension + w * kLanes, sums[r][w]);
}

// Turns one row's scores of a chunk into exp(score - maximum): the first `visible` keys; 0 for the others up to `keys`.
inline void exponentiate(const Geometry& g, float* scores, int visible, int keys, float* maximum, float* total) {
  const Vec nothing = splat(-kInfinity);
  Vec top = nothing;
  for (int b = 0; b * g.block_size < keys; ++b) {
    const int block_keys = int(min_of(g.block_size, keys - b * g.block_size));
    const int seen = int(min_of(block_keys, visible - b * g.block_size));
    float* block = scores + b * g.key_stride;
    for (int i = 0; i < block_keys; i += kLanes) {
      const int left = seen - i;
      const Vec v = left >= kLanes ? load(block + i) : left > 0 ? keep_first(load(block + i), left, nothing) : nothing;
      if (left < kLanes) store(block + i, v);
      top = max(top, v);
    }
  }
  *maximum = reduce_max(top);
  if (visible <= 0) *maximum = 0;  // every score is -inf: the exponentials must become 0
  const Vec offset = splat(*maximum);
  Vec sum = zero();
  for (int b = 0; b * g.block_size < keys; ++b) {
    const int block_keys = int(min_of(g.block_size, keys - b * g.block_size));
    for (int i = 0; i < block_keys; i += kLanes) {
      float* at = scores + b * g.key_stride + i;
      const Vec e = exp(load(at) - offset);
      store(at, e);
      sum = sum + e;
    }
  }
  *total = reduce_add(sum);
}

// Partial results of some rows over one chunk. `visible[r]`: how many keys of the chunk row r sees, the most is `keys`.
// MostRows: of a register tile.
template <int MostRows, class Type>
void attend_chunk(const Geometry& g, const float* queries, int rows, const int* visible, int keys, const HeadPart<Type>* parts,
                  float* scores, float* partial) {
  constexpr int kMostScoreRows = MostRows < kScoreRows ? MostRows : kScoreRows;
  constexpr int kMostValueRows = MostRows < kValueRows ? MostRows : kValueRows;
  for (int b = 0; b * g.block_size < keys; ++b) {
    const int vectors = int(ceil_div(min_of(g.block_size, keys - b * g.block_size), kLanes));
    const bool last = (b + 1) * g.block_size >= keys;
    for (int first = 0; first < vectors; first += kScoreWidth)
      visit_count<kScoreWidth>(vectors - first, [&](auto width) {
        const typename Type::Number* ahead = (last ? parts[0].values : parts[b + 1].keys) + first * kLanes;
        for (int r = 0; r < rows; r += kMostScoreRows)
          visit_count<kMostScoreRows>(rows - r, [&](auto count) {
            score_keys<count.value, width.value>(g, queries + r * g.head_dim, parts[b], first * kLanes, ahead,
                                                 scores + r * g.score_stride + b * g.key_stride + first * kLanes);
          });
      });
  }
  for (int r = 0; r < rows; ++r) {
    float* row = partial + r * g.partial_stride + g.value_stride;
    exponentiate(g, scores + r * g.score_stride, visible[r], keys, row, row + 1);
  }
  for (int r = 0; r < rows; r += kMostValueRows)
    visit_count<kMostValueRows>(rows - r, [&](auto count) {
      int most = 0;
      for (int i = r; i < r + count.value; ++i) most = int(max_of(most, visible[i]));
      for (int d = 0; d < g.value_stride; d += kValueWidth * kLanes)
        visit_count<kValueWidth>((g.value_stride - d) / kLanes, [&](auto width) {
          sum_values<count.value, width.value>(g, scores + r * g.score_stride, parts, most, d, partial + r * g.partial_stride);
        });
    });
}

// Adds a later chunk's partial result of one row to what came before.
inline void merge(const Geometry& g, float* row, const float* later) {
  float *maximum = row + g.value_stride, *total = maximum + 1;
  const float later_maximum = later[g.value_stride], later_total = later[g.value_stride + 1];
  const float top = *maximum > later_maximum ? *maximum : later_maximum;
  const Vec keep = exp(splat(*maximum - top)), add = exp(splat(later_maximum - top));
  for (int d = 0; d < g.value_stride; d += kLanes) store(row + d, fma(load(later + d), add, load(row + d) * keep));
  *total = add[0] * later_total + keep[0] * *total;
  *maximum = top;
}

// The numbers of `keys` keys and values of one block as float32, in the same arrangement.
template <class Type>
void expand(const Geometry& g, const HeadPart<Type>& part, int keys, float* to_keys, float* to_values) {
  for (int d = 0; d < g.head_dim; ++d)
    for (int i = 0; i < keys; i += kLanes) {
      Vec key = Type::load(part.keys + d * g.key_stride + i);
      if constexpr (Type::kScaled) key = key * load_half(part.key_scale(g, d) + i);
      store(to_keys + d * g.key_stride + i, key);
    }
  for (int i = 0; i < keys; ++i)
    for (int d = 0; d < g.value_stride; d += kLanes) {
      Vec value = Type::load(part.values + int64_t(i) * g.value_stride + d);
      if constexpr (Type::kScaled) value = value * splat_half(part.value_scale(g, i) + d / kScaleGroup);
      store(to_values + int64_t(i) * g.value_stride + d, value);
    }
}

}  // namespace puna::PUNA_ISA
