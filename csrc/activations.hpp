// The input of linear layers, prepared once for all of them: tiles of a few tokens, interleaved so that a kernel reads them in order.
//
// Quantized: for each group of 32 values a scale (largest magnitude / 127) and int8 values rounded to nearest even; a group
// with an infinite or NaN value gets the scale NaN, so that no such value is lost. A tile of W tokens holds
//   values       int8  [groups][8 quads][W][4]
//   scales       f32   [groups][W]
//   corrections  as the formats need them, see Correction
// Where a target has float weights, the floats themselves as [columns][W]; where it has weights that are multiplied as bfloat16,
// the values rounded to that (nearest even) as pairs [ceil(columns / 2)][W][2]. Tokens that pad a tile are zero.
#pragma once

#include "buffer.hpp"
#include "panel.hpp"
#include "simd.hpp"

namespace puna {
class ThreadPool;
}

namespace puna::PUNA_ISA {

// Terms that depend on the activations alone, for each group (Half...: each half group) and token.
enum Correction {
  kZero8,       // i32, -8 x the sum of the int8 values
  kZero128,     // i32, -128 x
  kHalfZero128,
  kHalfZero32,
  kSum,         // f32, scale x the sum of the int8 values
  kHalfSum,
  kCorrections,
  kNoCorrection = kCorrections,
};

// What a target wants to be given.
enum Input : unsigned { kFloats = 1, kPairs = 2, kCodes = 4 };

struct Tile {
  const float* floats;
  const uint32_t* pairs;
  const int8_t* values;
  const float* scales;
  const void* corrections[kCorrections];
};

// Tile widths that kernels exist for, ascending; a tile of fewer tokens is padded to the next.
#if defined(__AVX512F__)
constexpr int kWidths[] = {1, 2, 4, 8, 12};
#elif defined(__AVX2__)
constexpr int kWidths[] = {1, 2, 4};
#else
constexpr int kWidths[] = {1, 4};
#endif
constexpr int kWidthCount = sizeof kWidths / sizeof *kWidths;
constexpr int kMostTokens = kWidths[kWidthCount - 1];

class Activations {
 public:
  // `inputs` is a set of Input, `corrections` of 1 << Correction. Keeps no reference to x.
  Activations(ThreadPool& pool, const float* x, int64_t tokens, int64_t columns, unsigned inputs, unsigned corrections);

  int64_t tiles() const { return (tokens_ + kMostTokens - 1) / kMostTokens; }
  // Tokens of tile i, and the index in kWidths of the width they are padded to.
  int tokens(int64_t i) const { return int(tokens_ - i * kMostTokens < kMostTokens ? tokens_ - i * kMostTokens : kMostTokens); }
  int width_index(int64_t i) const;
  Tile tile(int64_t i) const;

 private:
  void fill(const float* x, int64_t tile) const;

  int64_t tokens_, columns_, groups_;
  unsigned inputs_, corrections_;
  int64_t token_bytes_;
  Buffer<uint8_t> memory_;
};

}  // namespace puna::PUNA_ISA
