// Encoders of blocks of 256 numbers: puna/tensor/kquants.py, iquants.py.
#include "block_types.hpp"
#include "encode_tiles.hpp"

namespace puna::PUNA_ISA {
namespace {

void pack_scales_and_minima(const float* scales, const float* minima, uint8_t* out) {
  uint8_t s[8], m[8];
  to_bytes<8>(scales, 0, s);
  to_bytes<8>(minima, 0, m);
  for (int g = 0; g < 4; ++g) {
    out[g] = uint8_t(s[g] | s[g + 4] >> 4 << 6);
    out[g + 4] = uint8_t(m[g] | m[g + 4] >> 4 << 6);
    out[g + 8] = uint8_t((s[g + 4] & 15) | (m[g + 4] & 15) << 4);
  }
}

bool encode_q2_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<16> scales, minima;
  if (!affine_blocks<16>(tile, 3, 15, scales, minima)) return false;
  for (int b = 0; b < blocks; ++b, out += 84) {
    for (int g = 0; g < 16; ++g) out[g] = uint8_t(int(scales.whole[b][g]) | int(minima.whole[b][g]) << 4);
    pack<2, 32, 64>(tile.codes + b * 256, out + 16);
    write_half(out + 80, scales.half[b]);
    write_half(out + 82, minima.half[b]);
  }
  return true;
}

bool encode_q3_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<16> scales;
  if (!symmetric_blocks(tile, 4, 32, scales)) return false;
  for (int b = 0; b < blocks; ++b, out += 110) {
    uint8_t stored[16];
    to_bytes<16>(scales.whole[b], 32, stored);
    pack<1, 32, 32>(tile.codes + b * 256, out, 2);
    pack<2, 32, 64>(tile.codes + b * 256, out + 32);
    pack<4, 8, 8>(stored, out + 96);
    pack<2, 4, 4>(stored, out + 104, 4);
    write_half(out + 108, scales.half[b]);
  }
  return true;
}

template <int Bits>
bool encode_q45_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<8> scales, minima;
  if (!affine_blocks<32>(tile, (1 << Bits) - 1, 63, scales, minima)) return false;
  constexpr int kHigh = Bits == 5 ? 32 : 0;
  for (int b = 0; b < blocks; ++b, out += 144 + kHigh) {
    write_half(out, scales.half[b]);
    write_half(out + 2, minima.half[b]);
    pack_scales_and_minima(scales.whole[b], minima.whole[b], out + 4);
    if (kHigh) pack<1, 32, 32>(tile.codes + b * 256, out + 16, 4);
    pack<4, 32, 128>(tile.codes + b * 256, out + 16 + kHigh);
  }
  return true;
}

bool encode_q6_k(Tile<256>& tile, int blocks, uint8_t* out) {
  WholeScales<16> scales;
  if (!symmetric_blocks(tile, 32, 128, scales)) return false;
  for (int b = 0; b < blocks; ++b, out += 210) {
    pack<4, 64, 128>(tile.codes + b * 256, out);
    pack<2, 32, 64>(tile.codes + b * 256, out + 128, 4);
    to_bytes<16>(scales.whole[b], 0, out + 192);
    write_half(out + 208, scales.half[b]);
  }
  return true;
}

bool encode_iq4_xs(Tile<256>& tile, int blocks, uint8_t* out) {
  float scale[kLanes * 8];
  each_group<32>(tile, [&](int first, const Lanes* x, const Lanes* weight) { put(scale + first, level_fit<32>(x, weight)); });
  WholeScales<8> scales;
  if (!make_signed<8>(scale, 32, scales)) return false;
  for (int b = 0; b < blocks; ++b, out += 136) {
    for (int i = 0; i < 256; ++i)
      tile.codes[b * 256 + i] = level_code(tile.x[b * 256 + i] * reciprocal(scales.factor[b] * scales.whole[b][i / 32]));
    uint8_t stored[8];
    to_bytes<8>(scales.whole[b], 32, stored);
    write_half(out, scales.half[b]);
    pack<2, 1, 2>(stored, out + 2, 4);
    pack<4, 1, 4>(stored, out + 4);
    pack<4, 16, 128>(tile.codes + b * 256, out + 8);
  }
  return true;
}

}  // namespace

TileEncoder tile_encoder(int type) {
  switch (type) {
    case kQ2_K: return encode_q2_k;
    case kQ3_K: return encode_q3_k;
    case kQ4_K: return encode_q45_k<4>;
    case kQ5_K: return encode_q45_k<5>;
    case kQ6_K: return encode_q6_k;
    case kIQ4_XS: return encode_iq4_xs;
    default: return nullptr;
  }
}

}  // namespace puna::PUNA_ISA
