// Linear layers: several outputs of one input, parallel over panels of weights and blocks of tokens.
#include "linear.hpp"

#include "kernels.hpp"

namespace puna::PUNA_ISA {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // activations of a block of tokens stay in the second-level cache
constexpr int64_t kMinChunkBytes = 16 << 10;  // weights that are worth one step of the shared counter
constexpr int64_t kChunksPerThread = 8;

const LinearType& find_type(int type) {
  const LinearType* found = find_nibble_type(type);
  if (!found) found = find_byte_type(type);
  if (!found) found = find_float_type(type);
  return *found;  // the bindings let no other type through
}

int64_t panels_of(const LinearTarget& target) { return (target.rows + kPanelRows - 1) / kPanelRows; }
int64_t panel_bytes(const LinearTarget& target, int64_t columns) {
  const PanelSize* size = find_panel_size(target.type);
  return columns / size->block_columns * size->block_bytes;
}

// Asks for the lines that `store_tile` will touch, so that they are there when the tile is done.
void prefetch_outputs(const LinearTarget& target, int64_t first_token, int count, int64_t panel) {
  for (int m = 0; m < count; m++) {
    const int64_t at = (first_token + m) * target.rows + panel * kPanelRows;
    __builtin_prefetch(target.out + at, 1);
    if (target.residual) __builtin_prefetch(target.residual + at);
  }
}

// out = tile + bias + residual, for the rows of one panel and `count` tokens.
void store_tile(const LinearTarget& target, const float* tile, int64_t first_token, int count, int64_t panel) {
  const int64_t first_row = panel * kPanelRows;
  const int rows = int(target.rows - first_row < kPanelRows ? target.rows - first_row : kPanelRows);
  for (int m = 0; m < count; m++, tile += kPanelRows) {
    const int64_t at = (first_token + m) * target.rows + first_row;
    for (int r = 0; r < rows; r += kLanes) {
      const int lanes = rows - r;
      Vec v = load(tile + r);
      if (lanes >= kLanes) {
        if (target.bias) v = v + load(target.bias + first_row + r);
        if (target.residual) v = v + load(target.residual + at + r);
        store(target.out + at + r, v);
      } else {
        if (target.bias) v = v + load_first(target.bias + first_row + r, lanes);
        if (target.residual) v = v + load_first(target.residual + at + r, lanes);
        store_first(target.out + at + r, v, lanes);
      }
    }
  }
}

}  // namespace

void linears(ThreadPool& pool, const float* x, int64_t tokens, int64_t columns, const LinearTarget* targets, int count) {
  unsigned inputs = 0, corrections = 0;
  int64_t panels = 0, bytes = 0;
  for (int i = 0; i < count; i++) {
    const LinearType& type = find_type(targets[i].type);
    inputs |= type.input;
    if (type.correction != kNoCorrection) corrections |= 1u << type.correction;
    panels += panels_of(targets[i]);
    bytes += panels_of(targets[i]) * panel_bytes(targets[i], columns);
  }
  if (tokens == 0 || panels == 0) return;
  const Activations activations(pool, x, tokens, columns, inputs, corrections);

  // Work items: all panels of all targets for the first block of tokens, then for the next.
  int64_t block = kBlockBytes / (columns * kMostTokens);  // in tiles
  block = block < 4 ? 4 : block;
  const int64_t blocks = (activations.tiles() + block - 1) / block;
  const int64_t items = blocks * panels;
  const int64_t by_bytes = (kMinChunkBytes * panels + bytes - 1) / bytes, by_threads = items / (pool.threads() * kChunksPerThread);
  pool.run(items, by_bytes > by_threads && tokens <= kMostTokens ? by_bytes : by_threads, [&](int64_t begin, int64_t end, int) {
    alignas(64) float out[kMostTokens * kPanelRows];
    for (int64_t item = begin; item < end; item++) {
      int64_t panel = item % panels;
      const LinearTarget* target = targets;
      for (; panel >= panels_of(*target); target++) panel -= panels_of(*target);
      const LinearType& type = find_type(target->type);
      const uint8_t* packed = target->packed + panel * panel_bytes(*target, columns);
      const int64_t first = item / panels * block;
      for (int64_t i = first; i < first + block && i < activations.tiles(); i++) {
        prefetch_outputs(*target, i * kMostTokens, activations.tokens(i), panel);
        type.kernels[activations.width_index(i)](packed, activations.tile(i), columns, out);
        store_tile(*target, out, i * kMostTokens, activations.tokens(i), panel);
      }
    }
  });
}

}  // namespace puna::PUNA_ISA
