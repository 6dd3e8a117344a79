// The layout of the paged key/value cache: one buffer for all layers.
//
//   buffer   [num_blocks][layers][kv_heads][head part]; a block holds `block_size` positions of every layer
//   part     keys, then their scales, then values, then their scales, each at a multiple of 64 bytes
//   keys     [head_dim][key_stride]      transposed, so that a vector holds one dimension of many keys
//   values   [block_size][value_stride]
//   scales   of q8_0 only, float16 for each 32 dimensions: keys [head_dim / 32][key_stride], values [block_size][head_dim / 32]
//
// Slot s is position s % block_size of block s / block_size. The strides are padded to a multiple of 16 numbers; what lies in
// the padding is never used. Blocks are contiguous, so that one block can be copied or stored as a whole.
//
// Plain data and a declaration: this header is shared by the kernel sources (see the rules in kernels.hpp).
#pragma once

#include <cstdint>

namespace puna {

// All offsets in bytes, all strides in numbers.
struct CacheLayout {
  int type;  // kF32, kF16, kBF16 or kQ8_0
  int64_t num_blocks, block_size;
  int layers, kv_heads, head_dim;
  int key_stride, value_stride;
  int64_t key_scales, values, value_scales;  // from the start of a head's part, where the keys are
  int64_t head_bytes, layer_bytes, block_bytes;
};

// Throws std::invalid_argument for a type that has no cache, and for q8_0 with a head_dim that is not a multiple of 32.
CacheLayout cache_layout(int type, int64_t num_blocks, int64_t block_size, int layers, int kv_heads, int head_dim);

}  // namespace puna
