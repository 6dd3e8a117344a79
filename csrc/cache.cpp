#include "cache.hpp"

#include <stdexcept>

#include "block_types.hpp"

namespace puna {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int64_t kLine = 64, kStrideMultiple = 16, kQ8Numbers = 32;

}  // namespace

CacheLayout cache_layout(int type, int64_t num_blocks, int64_t block_size, int layers, int kv_heads, int head_dim) {
  if (num_blocks < 1 || block_size < 1 || layers < 1 || kv_heads < 1 || head_dim < 1)
    throw std::invalid_argument("cache: all numbers must be positive");
  if (type != kF32 && type != kF16 && type != kBF16 && type != kQ8_0) throw std::invalid_argument("cache: no such type of cache");
  if (type == kQ8_0 && head_dim % kQ8Numbers != 0) throw std::invalid_argument("cache: q8_0 needs a head_dim that is a multiple of 32");
  const int64_t key_stride = round_up(block_size, kStrideMultiple), value_stride = round_up(head_dim, kStrideMultiple);
  const int64_t number_bytes = type == kF32 ? 4 : type == kQ8_0 ? 1 : 2;
  const int64_t scales = type == kQ8_0 ? head_dim / kQ8Numbers : 0;
  CacheLayout layout{};
  layout.type = type;
  layout.num_blocks = num_blocks;
  layout.block_size = block_size;
  layout.layers = layers;
  layout.kv_heads = kv_heads;
  layout.head_dim = head_dim;
  layout.key_stride = int(key_stride);
  layout.value_stride = int(value_stride);
  layout.key_scales = round_up(head_dim * key_stride * number_bytes, kLine);
  layout.values = layout.key_scales + round_up(2 * scales * key_stride, kLine);
  layout.value_scales = layout.values + round_up(block_size * value_stride * number_bytes, kLine);
  layout.head_bytes = layout.value_scales + round_up(2 * scales * block_size, kLine);
  layout.layer_bytes = kv_heads * layout.head_bytes;
  layout.block_bytes = layers * layout.layer_bytes;
  return layout;
}

}  // namespace puna
