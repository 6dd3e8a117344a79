// float32 to encoded blocks, bit for bit what the numpy encoders of puna/tensor give.
#include <atomic>

#include "block_types.hpp"
#include "encode_tiles.hpp"
#include "kernels.hpp"

namespace puna::PUNA_ISA {
namespace {

constexpr float kBeyond = 1e8f;  // as check_storable: no scale that float16 holds reaches so far

// Blocks first to end of all rows; each row has `per_row` of them.
template <int Numbers, class Encoder>
bool encode_tiles(Encoder encode, int bytes, int64_t per_row, const float* x, const float* importance, int64_t first,
                  int64_t end, uint8_t* out) {
  Tile<Numbers> tile;
  for (int64_t b = first; b < end; b += kLanes) {
    const int count = int(end - b < kLanes ? end - b : kLanes);
    std::memset(&tile, 0, sizeof tile);
    std::memcpy(tile.x, x + b * Numbers, size_t(count) * Numbers * 4);
    for (int i = 0; i < count * Numbers; ++i)
      if (!(std::fabs(tile.x[i]) < kBeyond)) return false;
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < Numbers; ++j) tile.weight[i * Numbers + j] = importance ? importance[(b + i) % per_row * Numbers + j] : 1.0f;
    if (!encode(tile, count, out + b * bytes)) return false;
  }
  return true;
}

}  // namespace

// Rows of numbers x [rows, columns] as blocks of `type`; importance [columns] or null. False for a type without an encoder, and
// where a number can't be held by a block.
bool encode_rows(ThreadPool& pool, int type, int64_t rows, int64_t columns, const float* x, const float* importance, uint8_t* out) {
  const BlockShape shape = block_shape(type);
  const int64_t per_row = columns / shape.numbers, blocks = rows * per_row;
  const TileEncoder large = tile_encoder(type);
  const SmallTileEncoder small = small_tile_encoder(type, importance != nullptr);
  const BlockEncoder plain = block_encoder(type);
  if (!large && !small && !plain) return false;
  std::atomic<bool> good{true};
  pool.run(blocks, int64_t{32768} / shape.numbers, [&](int64_t begin, int64_t end, int) {
    bool done = true;
    if (large)
      done = encode_tiles<256>(large, shape.bytes, per_row, x, importance, begin, end, out);
    else if (small)
      done = encode_tiles<32>(small, shape.bytes, per_row, x, importance, begin, end, out);
    else
      for (int64_t b = begin; b < end && done; ++b) done = plain(x + b * 32, out + b * shape.bytes);
    if (!done) good = false;
  });
  return good;
}

}  // namespace puna::PUNA_ISA
