#include "activations.hpp"

#include "dot.hpp"
#include "threadpool.hpp"

namespace puna::PUNA_ISA {
namespace {

constexpr int64_t kInlineValues = 32768;  // up to so many, waking the pool costs more than it saves
constexpr float kSmallest = 1e-30f;       // below, 127 / magnitude may overflow; such a group is taken as zero

constexpr int halves(int correction) { return correction == kHalfZero128 || correction == kHalfZero32 || correction == kHalfSum ? 2 : 1; }

constexpr int64_t pairs_of(int64_t columns) { return (columns + 1) / 2; }

// Bytes that one token takes of a tile.
int64_t token_bytes(int64_t columns, unsigned inputs, unsigned corrections) {
  const int64_t groups = columns / kGroup;
  int64_t bytes = inputs & kFloats ? 4 * columns : 0;
  if (inputs & kPairs) bytes += 4 * pairs_of(columns);
  if (inputs & kCodes) bytes += kGroup * groups + 4 * groups;
  for (int c = 0; inputs & kCodes && c < kCorrections; c++)
    if (corrections >> c & 1) bytes += 4 * halves(c) * groups;
  return bytes;
}

// Lanes of -127 ... 127 as bytes.
inline void store_bytes(int8_t* to, IntVec v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
#elif defined(__AVX2__)
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#else
  for (int i = 0; i < kLanes; i++) to[i] = int8_t(v[i]);
#endif
}

inline IntVec add(IntVec a, IntVec b) {
#if defined(__AVX512F__)
  return _mm512_add_epi32(a, b);
#elif defined(__AVX2__)
  return _mm256_add_epi32(a, b);
#else
  return a + b;
#endif
}

inline int32_t sum(IntVec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(v);
#else
  int32_t lanes[kLanes], total = 0;
  std::memcpy(lanes, &v, sizeof v);
  for (const int32_t lane : lanes) total += lane;
  return total;
#endif
}

// Nearest whole numbers within -127 ... 127, of NaN too: its group's scale is NaN, and sums must not overflow.
inline IntVec round_to_code(Vec v) { return round_to_int(max(min(v, splat(127.0f)), splat(-127.0f))); }

struct Group {
  int8_t values[kGroup];
  int32_t half_sums[2];
  float scale;
};

inline Group quantize(const float* x) {
  Vec magnitudes = zero(), poison = zero();
  PUNA_UNROLL
  for (int i = 0; i < kGroup; i += kLanes) {
    const Vec v = load(x + i);
    magnitudes = max(magnitudes, max(v, zero() - v));
    poison = fma(v, zero(), poison);  // NaN where v is infinite or NaN, else zero
  }
  const float largest = reduce_max(magnitudes);
  const float inverse = largest < kSmallest ? 0.0f : 127.0f / largest;
  Group group;
  group.scale = largest / 127.0f + reduce_add(poison);
  PUNA_UNROLL
  for (int h = 0; h < 2; h++) {
    constexpr int half = kGroup / 2;
    IntVec total = round_to_code(load(x + half * h) * splat(inverse));
    store_bytes(group.values + half * h, total);
    PUNA_UNROLL
    for (int i = half * h + kLanes; i < half * (h + 1); i += kLanes) {
      const IntVec rounded = round_to_code(load(x + i) * splat(inverse));
      store_bytes(group.values + i, rounded);
      total = add(total, rounded);
    }
    group.half_sums[h] = sum(total);
  }
  return group;
}

// x [count, columns] as pairs [ceil(columns / 2)][width] of bfloat16.
void fill_pairs(const float* x, int64_t count, int64_t width, int64_t columns, uint32_t* pairs) {
#if defined(__AVX512BF16__)
  for (int64_t k = 0; k < columns; k += kLanes) {  // tokens innermost, so that the tile is written in order
    const int lanes = int(columns - k < kLanes ? columns - k : kLanes);
    uint32_t rounded[kMostTokens][kLanes / 2] = {};
    for (int64_t m = 0; m < count; m++) {
      const __m256bh row = _mm512_cvtneps_pbh(load_first(x + m * columns + k, lanes));
      std::memcpy(rounded[m], &row, sizeof row);
    }
    for (int64_t i = 0; i < (lanes + 1) / 2; i++)
      for (int64_t m = 0; m < width; m++) *pairs++ = rounded[m][i];
  }
#else
  (void)x, (void)count, (void)width, (void)columns, (void)pairs;  // no kernel of this instruction set wants them
#endif
}

}  // namespace

Activations::Activations(ThreadPool& pool, const float* x, int64_t tokens, int64_t columns, unsigned inputs, unsigned corrections)
    : tokens_(tokens),
      columns_(columns),
      groups_(columns / kGroup),
      inputs_(inputs),
      corrections_(corrections),
      token_bytes_(token_bytes(columns, inputs, corrections)),
      memory_(tiles() * kMostTokens * token_bytes_) {
  pool.run(tiles(), tokens * columns <= kInlineValues ? tiles() : 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) fill(x, i);
  });
}

int Activations::width_index(int64_t i) const {
  int index = 0;
  while (kWidths[index] < tokens(i)) index++;
  return index;
}

Tile Activations::tile(int64_t i) const {
  const int64_t width = kWidths[width_index(i)];
  const uint8_t* p = memory_.data + i * kMostTokens * token_bytes_;
  Tile tile{};
  if (inputs_ & kFloats) tile.floats = reinterpret_cast<const float*>(p), p += 4 * columns_ * width;
  if (inputs_ & kPairs) tile.pairs = reinterpret_cast<const uint32_t*>(p), p += 4 * pairs_of(columns_) * width;
  if (!(inputs_ & kCodes)) return tile;
  tile.values = reinterpret_cast<const int8_t*>(p), p += kGroup * groups_ * width;
  tile.scales = reinterpret_cast<const float*>(p), p += 4 * groups_ * width;
  for (int c = 0; c < kCorrections; c++)
    if (corrections_ >> c & 1) tile.corrections[c] = p, p += 4 * halves(c) * groups_ * width;
  return tile;
}

void Activations::fill(const float* x, int64_t index) const {
  const Tile tile = this->tile(index);
  const int count = tokens(index);
  const int64_t width = kWidths[width_index(index)];
  x += index * kMostTokens * columns_;
  auto* floats = const_cast<float*>(tile.floats);
  auto* values = const_cast<int8_t*>(tile.values);
  auto* scales = const_cast<float*>(tile.scales);
  const auto set = [&](Correction c, int64_t at, auto value) {
    if (corrections_ >> c & 1) std::memcpy(static_cast<uint8_t*>(const_cast<void*>(tile.corrections[c])) + 4 * at, &value, 4);
  };
  for (int64_t m = 0; inputs_ & kFloats && m < width; m++)
    for (int64_t k = 0; k < columns_; k++) floats[k * width + m] = m < count ? x[m * columns_ + k] : 0.0f;
  if (inputs_ & kPairs) fill_pairs(x, count, width, columns_, const_cast<uint32_t*>(tile.pairs));
  for (int64_t g = 0; inputs_ & kCodes && g < groups_; g++) {
    for (int64_t m = 0; m < width; m++) {  // innermost, so that the tile is written in order
      const Group group = m < count ? quantize(x + m * columns_ + g * kGroup) : Group{};
      PUNA_UNROLL
      for (int q = 0; q < kGroup / 4; q++) std::memcpy(values + ((g * (kGroup / 4) + q) * width + m) * 4, group.values + 4 * q, 4);
      scales[g * width + m] = group.scale;
      const int32_t sum = group.half_sums[0] + group.half_sums[1];
      set(kZero8, g * width + m, int32_t(-8 * sum));
      set(kZero128, g * width + m, int32_t(-128 * sum));
      set(kSum, g * width + m, group.scale * float(sum));
      for (int h = 0; h < 2; h++) {
        set(kHalfZero128, (2 * g + h) * width + m, int32_t(-128 * group.half_sums[h]));
        set(kHalfZero32, (2 * g + h) * width + m, int32_t(-32 * group.half_sums[h]));
        set(kHalfSum, (2 * g + h) * width + m, group.scale * float(group.half_sums[h]));
      }
    }
  }
}

}  // namespace puna::PUNA_ISA
