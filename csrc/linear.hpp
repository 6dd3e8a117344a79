// The inner loops of linear layers: one panel of 16 rows times one tile of W tokens, for every format and width.
//
// An output element is acc = fma(w_scale x a_scale, dot, acc), then acc = fma(w_min, a_sum, acc) where the format has minima,
// over the groups in order: the same operations whatever the tile around it, so results do not depend on the batch.
#pragma once

#include <utility>

#include "activations.hpp"
#include "dot.hpp"

namespace puna::PUNA_ISA {

// panel x tile -> out [W][16]
using TileKernel = void (*)(const uint8_t* panel, const Tile& tile, int64_t columns, float* out);

// What the driver needs to know of a type.
struct LinearType {
  int type;
  Input input;
  Correction correction;
  TileKernel kernels[kWidthCount];
};
// Null where the file does not hold that type.
const LinearType* find_float_type(int type);
const LinearType* find_nibble_type(int type);
const LinearType* find_byte_type(int type);

constexpr int kPrefetchBytes = 4096;  // ahead of the stream of weights; past the end of the panel lies the next one

// The vectors of a panel row that a kernel holds at once: all of them for few tokens, else as many as the registers bear.
constexpr int kVectors = kPanelRows / kLanes;
constexpr int row_vectors(int width, bool floats) {
  return kLanes == 16 ? 1 : kLanes == 8 ? (width <= 2 || floats ? 2 : 1) : (width == 1 || floats ? 4 : 1);
}

consteval Correction correction_of(PanelFormat f) {
  switch (f.scales) {
    case Scales::HalfMin: case Scales::SubMin: return kSum;
    case Scales::HalfGroupMin: return kHalfSum;
    case Scales::None: return kNoCorrection;
    default:
      if (f.zero == 8) return kZero8;
      if (f.zero == 32) return kHalfZero32;
      if (kSignedDot) return kNoCorrection;
      return f.scales == Scales::HalfGroup ? kHalfZero128 : kZero128;
  }
}
consteval Input input_of(PanelFormat f) {
  if (f.scales != Scales::None) return kCodes;
  return f.codes == Codes::BF16 && kBfloat16Dot ? kPairs : kFloats;
}
consteval bool has_halves(PanelFormat f) { return f.scales == Scales::HalfGroup || f.scales == Scales::HalfGroupMin; }
consteval bool has_min(PanelFormat f) { return correction_of(f) == kSum || correction_of(f) == kHalfSum; }

template <int R>
struct Rows {
  Vec v[R];
};

// Adds the products of quads [First, Last) of a group: sums [W][R], lanes are rows.
template <Codes C, int First, int Last, int W, int R>
inline void dot_quads(const uint8_t* codes, const int8_t* activations, IntVec (&sums)[W][R]) {
  constexpr bool nibbles = C == Codes::Nibbles || C == Codes::NibbleTable;
  using D = Dot<C>;
  typename D::Partial partial[W][R];
  PUNA_UNROLL
  for (int m = 0; m < W; m++)
    PUNA_UNROLL
    for (int r = 0; r < R; r++) partial[m][r] = D::start(sums[m][r]);
  const auto add = [&](int quad, const Bytes(&code)[R]) __attribute__((always_inline)) {
    PUNA_UNROLL
    for (int m = 0; m < W; m++) {
      const Bytes activation = splat_quad(activations + (quad * W + m) * 4);
      PUNA_UNROLL
      for (int r = 0; r < R; r++) partial[m][r] = D::add(partial[m][r], code[r], activation);
    }
  };
  PUNA_UNROLL
  for (int quad = First; quad < (nibbles ? Last / 2 : Last); quad++) {
    Bytes code[R], high[R];
    PUNA_UNROLL
    for (int r = 0; r < R; r++) {
      if constexpr (C == Codes::SixBits) {
        const uint8_t* from = codes + r * 4 * kLanes;
        const Bytes pair = load_bytes(from + quad % 4 * 4 * kPanelRows);
        const Bytes plane = load_bytes(from + (4 + quad / 4) * 4 * kPanelRows);
        code[r] = join(quad < 4 ? low_nibbles(pair) : high_nibbles(pair), high_bits(plane, quad % 4));
        continue;
      }
      code[r] = load_bytes(codes + quad * 4 * kPanelRows + r * 4 * kLanes);
      if constexpr (nibbles) high[r] = high_nibbles(code[r]), code[r] = low_nibbles(code[r]);
      if constexpr (C == Codes::NibbleTable) high[r] = look_up(high[r]), code[r] = look_up(code[r]);
    }
    add(quad, code);
    if constexpr (nibbles) add(quad + 4, high);
  }
  PUNA_UNROLL
  for (int m = 0; m < W; m++)
    PUNA_UNROLL
    for (int r = 0; r < R; r++) sums[m][r] = D::finish(sums[m][r], partial[m][r]);
}

// Quads [First, Last) of one group under one scale (and minimum): the update of the accumulators. `half` is the half group.
template <PanelFormat F, int First, int Last, int W, int R>
inline void update(const uint8_t* codes, const Tile& tile, int64_t group, int half, const Rows<R>& scale, const Rows<R>& minimum,
                   Vec (&acc)[W][R]) {
  constexpr Correction correction = correction_of(F);
  const int64_t at = (has_halves(F) ? 2 * group + half : group) * W;
  IntVec sums[W][R];
  PUNA_UNROLL
  for (int m = 0; m < W; m++)
    PUNA_UNROLL
    for (int r = 0; r < R; r++)
      sums[m][r] = correction == kNoCorrection || has_min(F) ? splat_int(0)
                                                             : splat_int(static_cast<const int32_t*>(tile.corrections[correction])[at + m]);
  const int8_t* activations = tile.values + group * kGroup * W;
  if constexpr (F.codes == Codes::SixBits) {
    dot_quads<F.codes, First, First + 2>(codes, activations, sums);
    dot_quads<F.codes, First + 2, Last>(codes, activations, sums);
  } else if constexpr (F.codes == Codes::UnsignedBytes && Last - First > 4) {
    dot_quads<F.codes, First, First + 4>(codes, activations, sums);
    dot_quads<F.codes, First + 4, Last>(codes, activations, sums);
  } else {
    dot_quads<F.codes, First, Last>(codes, activations, sums);
  }
  PUNA_UNROLL
  for (int m = 0; m < W; m++) {
    const Vec a = splat(tile.scales[group * W + m]);
    PUNA_UNROLL
    for (int r = 0; r < R; r++) {
      acc[m][r] = fma(scale.v[r] * a, to_float(sums[m][r]), acc[m][r]);
      if constexpr (has_min(F)) acc[m][r] = fma(minimum.v[r], splat(static_cast<const float*>(tile.corrections[correction])[at + m]), acc[m][r]);
    }
  }
}

template <int R>
inline Rows<R> load_halves(const uint8_t* p, int row) {
  Rows<R> rows;
  PUNA_UNROLL
  for (int r = 0; r < R; r++) rows.v[r] = load_half(reinterpret_cast<const uint16_t*>(p) + row + r * kLanes);
  return rows;
}

// d x the byte sub-scales at p.
template <bool Signed, int R>
inline Rows<R> sub_scales(const Rows<R>& d, const uint8_t* p, int row) {
  Rows<R> rows;
  PUNA_UNROLL
  for (int r = 0; r < R; r++) {
    const uint8_t* at = p + row + r * kLanes;
    rows.v[r] = d.v[r] * (Signed ? load_signed(reinterpret_cast<const int8_t*>(at)) : load_unsigned(at));
  }
  return rows;
}

// R vectors of rows, from `row`, of a quantized panel.
template <PanelFormat F, int W, int R>
inline void quantized_rows(const uint8_t* panel, const Tile& tile, int64_t columns, int row, float* out) {
  constexpr int block = block_columns(F), groups = block / kGroup, bytes = block_bytes(F), sub = kPanelRows;
  // Streams of whole bytes come faster through the second-level cache, those of nibbles through the first.
  constexpr int locality = F.codes == Codes::SignedBytes ? 2 : 3;
  Vec acc[W][R];
  PUNA_UNROLL
  for (int m = 0; m < W; m++)
    PUNA_UNROLL
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  for (int64_t b = 0; b < columns / block; b++, panel += bytes) {
    Rows<R> d, dmin{};
    if constexpr (F.scales == Scales::Single) {
      for (int r = 0; r < R; r++) d.v[r] = load(reinterpret_cast<const float*>(panel) + row + r * kLanes);
    } else {
      d = load_halves<R>(panel, row);
    }
    if constexpr (has_min(F)) dmin = load_halves<R>(panel + 2 * kPanelRows, row);
    for (int g = 0; g < groups; g++) {
      const uint8_t* scales = panel + block_header_bytes(F) + g * group_scale_bytes(F);
      const uint8_t* codes = panel + block_scale_bytes(F) + g * group_code_bytes(F) + row * 4;
      const int64_t group = b * groups + g;
      for (int i = 0; i < bytes / groups; i += 64) __builtin_prefetch(panel + g * (bytes / groups) + i + kPrefetchBytes, 0, locality);
      if constexpr (F.scales == Scales::Sub) {
        update<F, 0, 8>(codes, tile, group, 0, sub_scales<true>(d, scales, row), dmin, acc);
      } else if constexpr (F.scales == Scales::SubMin) {
        update<F, 0, 8>(codes, tile, group, 0, sub_scales<false>(d, scales, row), sub_scales<false>(dmin, scales + sub, row), acc);
      } else if constexpr (F.scales == Scales::HalfGroup) {
        update<F, 0, 4>(codes, tile, group, 0, sub_scales<true>(d, scales, row), dmin, acc);
        update<F, 4, 8>(codes, tile, group, 1, sub_scales<true>(d, scales + sub, row), dmin, acc);
      } else if constexpr (F.scales == Scales::HalfGroupMin) {
        update<F, 0, 4>(codes, tile, group, 0, sub_scales<false>(d, scales, row), sub_scales<false>(dmin, scales + sub, row), acc);
        update<F, 4, 8>(codes, tile, group, 1, sub_scales<false>(d, scales + 2 * sub, row), sub_scales<false>(dmin, scales + 3 * sub, row), acc);
      } else {
        update<F, 0, 8>(codes, tile, group, 0, d, dmin, acc);
      }
    }
  }
  for (int m = 0; m < W; m++)
    for (int r = 0; r < R; r++) store(out + m * kPanelRows + row + r * kLanes, acc[m][r]);
}

// R vectors of rows, from `row`, of a panel of floats.
template <PanelFormat F, int W, int R>
inline void float_rows(const uint8_t* panel, const Tile& tile, int64_t columns, int row, float* out) {
  Vec acc[W][R];
  PUNA_UNROLL
  for (int m = 0; m < W; m++)
    PUNA_UNROLL
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  for (int64_t k = 0; k < columns; k++, panel += block_bytes(F)) {
    __builtin_prefetch(panel + kPrefetchBytes);
    Vec w[R];
    PUNA_UNROLL
    for (int r = 0; r < R; r++) {
      const int at = row + r * kLanes;
      if constexpr (F.codes == Codes::F32) w[r] = load(reinterpret_cast<const float*>(panel) + at);
      if constexpr (F.codes == Codes::F16) w[r] = load_half(reinterpret_cast<const uint16_t*>(panel) + at);
      if constexpr (F.codes == Codes::BF16) w[r] = load_bf16(reinterpret_cast<const uint16_t*>(panel) + at);
    }
    PUNA_UNROLL
    for (int m = 0; m < W; m++) {
      const Vec a = splat(tile.floats[k * W + m]);
      PUNA_UNROLL
      for (int r = 0; r < R; r++) acc[m][r] = fma(w[r], a, acc[m][r]);
    }
  }
  for (int m = 0; m < W; m++)
    for (int r = 0; r < R; r++) store(out + m * kPanelRows + row + r * kLanes, acc[m][r]);
}

#if defined(__AVX512BF16__)
// One panel of bfloat16: two inner values at a time, each pair of products added to a row's float32 sum by one instruction.
template <int W>
inline void bfloat16_panel(const uint8_t* panel, const Tile& tile, int64_t columns, float* out) {
  Vec acc[W];
  PUNA_UNROLL
  for (int m = 0; m < W; m++) acc[m] = zero();
  const Bytes order = pair_order();
  const uint32_t* pairs = tile.pairs;
  for (int64_t k = 0; k < columns; k += 2, panel += 4 * kPanelRows, pairs += W) {
    __builtin_prefetch(panel + kPrefetchBytes);
    const Bytes w = load_pairs(panel, columns - k, order);
    PUNA_UNROLL
    for (int m = 0; m < W; m++) acc[m] = add_pair_products(acc[m], w, pairs[m]);
  }
  for (int m = 0; m < W; m++) store(out + m * kPanelRows, acc[m]);
}
#endif

template <PanelFormat F, int W>
void tile_kernel(const uint8_t* panel, const Tile& tile, int64_t columns, float* out) {
#if defined(__AVX512BF16__)
  if constexpr (input_of(F) == kPairs) return bfloat16_panel<W>(panel, tile, columns, out);
#endif
  constexpr bool floats = F.scales == Scales::None;
  constexpr int R = row_vectors(W, floats);
  for (int row = 0; row < kPanelRows; row += R * kLanes) {
    if constexpr (floats) {
      float_rows<F, W, R>(panel, tile, columns, row, out);
    } else {
      quantized_rows<F, W, R>(panel, tile, columns, row, out);
    }
  }
}

template <PanelFormat F, size_t... I>
constexpr LinearType linear_type(std::index_sequence<I...>) {
  return {F.type, input_of(F), correction_of(F), {tile_kernel<F, kWidths[I]>...}};
}

// The entries of some types, for the find_ functions.
template <int... Type>
struct LinearTypes {
  static constexpr LinearType kTypes[] = {linear_type<panel_format(Type)>(std::make_index_sequence<kWidthCount>{})...};
  static const LinearType* find(int type) {
    for (const LinearType& entry : kTypes)
      if (entry.type == type) return &entry;
    return nullptr;
  }
};

}  // namespace puna::PUNA_ISA
