// The weight encodings by their numbers in GGUF files, as in puna/tensor/types.py: how many numbers a block packs into how
// many bytes.
#pragma once

namespace puna {

enum BlockType {
  kF32 = 0, kF16 = 1, kBF16 = 30,
  kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8,
  kQ2_K = 10, kQ3_K = 11, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kQ8_K = 15,
  kIQ4_NL = 20, kIQ4_XS = 23,
};

struct BlockShape {
  int numbers, bytes;
};

// {0, 0} for a type that isn't known. Static: each translation unit has its own copy, compiled for its instruction set.
static constexpr BlockShape block_shape(int type) {
  switch (type) {
    case kF32: return {1, 4};
    case kF16: return {1, 2};
    case kBF16: return {1, 2};
    case kQ4_0: return {32, 18};
    case kQ4_1: return {32, 20};
    case kQ5_0: return {32, 22};
    case kQ5_1: return {32, 24};
    case kQ8_0: return {32, 34};
    case kQ2_K: return {256, 84};
    case kQ3_K: return {256, 110};
    case kQ4_K: return {256, 144};
    case kQ5_K: return {256, 176};
    case kQ6_K: return {256, 210};
    case kQ8_K: return {256, 292};
    case kIQ4_NL: return {32, 18};
    case kIQ4_XS: return {256, 136};
    default: return {0, 0};
  }
}

}  // namespace puna
