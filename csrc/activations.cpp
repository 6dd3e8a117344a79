#include "activations.hpp"

#include "threadpool.hpp"

namespace puna::PUNA_ISA {
namespace {

constexpr int64_t kInlineValues = 32768;  // up to so many, waking the pool costs more than it saves
constexpr float kSmallest = 1e-30f;       // below, 127 / magnitude may overflow; such a group is taken as zero

constexpr int halves(int correction) { return correction == kHalfZero128 || correction == kHalfSum ? 2 : 1; }

// Bytes that one token takes of a tile.
int64_t token_bytes(int64_t columns, bool floats, bool quantized, unsigned corrections) {
  const int64_t groups = columns / kGroup;
  int64_t bytes = floats ? 4 * columns : 0;
  if (quantized) bytes += kGroup * groups + 4 * groups;
  for (int c = 0; quantized && c < kCorrections; c++)
    if (corrections >> c & 1) bytes += 4 * halves(c) * groups;
  return bytes;
}

struct Group {
  int8_t values[kGroup];
  int32_t half_sums[2];
  float scale;
};

inline Group quantize(const float* x) {
  Vec magnitudes = zero(), poison = zero();
  for (int i = 0; i < kGroup; i += kLanes) {
    const Vec v = load(x + i);
    magnitudes = max(magnitudes, max(v, zero() - v));
    poison = fma(v, zero(), poison);  // NaN where v is infinite or NaN, else zero
  }
  const float largest = reduce_max(magnitudes);
  const float inverse = largest < kSmallest ? 0.0f : 127.0f / largest;
  int32_t rounded[kGroup];
  for (int i = 0; i < kGroup; i += kLanes) {
    const IntVec v = round_to_int(load(x + i) * splat(inverse));
    std::memcpy(rounded + i, &v, sizeof v);
  }
  Group group;
  group.scale = largest / 127.0f + reduce_add(poison);
  for (int h = 0; h < 2; h++) {
    int32_t sum = 0;
    for (int i = 16 * h; i < 16 * (h + 1); i++) {
      group.values[i] = int8_t(rounded[i]);
      sum += group.values[i];
    }
    group.half_sums[h] = sum;
  }
  return group;
}

}  // namespace

Activations::Activations(ThreadPool& pool, const float* x, int64_t tokens, int64_t columns, bool floats, bool quantized,
                         unsigned corrections)
    : tokens_(tokens),
      columns_(columns),
      groups_(columns / kGroup),
      floats_(floats),
      quantized_(quantized),
      corrections_(corrections),
      token_bytes_(token_bytes(columns, floats, quantized, corrections)),
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
  if (floats_) tile.floats = reinterpret_cast<const float*>(p), p += 4 * columns_ * width;
  if (!quantized_) return tile;
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
  for (int64_t m = 0; m < width; m++) {
    if (floats_) {
      for (int64_t k = 0; k < columns_; k++) floats[k * width + m] = m < count ? x[m * columns_ + k] : 0.0f;
    }
    for (int64_t g = 0; quantized_ && g < groups_; g++) {
      const Group group = m < count ? quantize(x + m * columns_ + g * kGroup) : Group{};
      for (int q = 0; q < kGroup / 4; q++) std::memcpy(values + ((g * (kGroup / 4) + q) * width + m) * 4, group.values + 4 * q, 4);
      scales[g * width + m] = group.scale;
      const int32_t sum = group.half_sums[0] + group.half_sums[1];
      set(kZero8, g * width + m, int32_t(-8 * sum));
      set(kZero128, g * width + m, int32_t(-128 * sum));
      set(kSum, g * width + m, group.scale * float(sum));
      for (int h = 0; h < 2; h++) {
        set(kHalfZero128, (2 * g + h) * width + m, int32_t(-128 * group.half_sums[h]));
        set(kHalfSum, (2 * g + h) * width + m, group.scale * float(group.half_sums[h]));
      }
    }
  }
}

}  // namespace puna::PUNA_ISA
