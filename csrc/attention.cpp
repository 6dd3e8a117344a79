// Causal attention over a paged cache of float16 keys and values.
//
// Cache of one layer, with P(n) = n rounded up to a multiple of 16 (padding stays zero):
//   keys    [num_blocks][kv_heads][head_dim][P(block_size)]   transposed, so that a vector holds one dimension of many keys
//   values  [num_blocks][kv_heads][block_size][P(head_dim)]
// Slot s is position s % block_size of block s / block_size. What float16 cannot hold is stored as its largest number.
//
// Work is cut into tiles: a few tokens of one sequence times the query heads that share one key/value head, so that each key
// and value that is read serves every row (token, head) of the tile. The context is cut into chunks of about 256 keys: for a
// chunk, the scores of all rows, then their exponentials relative to the chunk's maximum, then the weighted sum of values.
// Chunks are merged in order (online softmax, Milakov & Gimelshein 2018; flash decoding, Dao et al. 2023).
//
// A row's result is always the same sequence of operations: over head_dim for a score, over the keys of a chunk for a sum,
// over chunks for the merge. So it depends neither on the tile it is in (decoding or prefill), nor on who computes which chunk.
#include "buffer.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int kPad = kCachePad;
constexpr int kChunkKeys = 256;
constexpr int kTileRows = 48;
constexpr int kMaxChunkBlocks = kChunkKeys;          // blocks of one key
constexpr int kUnitsPerThread = 4;                   // with fewer tiles than this they are split
constexpr int64_t kMaxSharedFloats = int64_t(1) << 24;  // 64 MiB; with more to keep they aren't

// Register tiles: rows times vectors of accumulators.
#if defined(__AVX512F__)
constexpr int kScoreRows = 12, kScoreWidth = 2, kValueRows = 6, kValueWidth = 4;
#elif defined(__AVX2__)
constexpr int kScoreRows = 6, kScoreWidth = 2, kValueRows = 6, kValueWidth = 2;
#else
constexpr int kScoreRows = 4, kScoreWidth = 2, kValueRows = 4, kValueWidth = 2;
#endif

constexpr int64_t pad(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// What follows from the shapes.
struct Geometry {
  const AttendArgs& args;
  int group;            // query heads of one key/value head
  int block_size;
  int head_dim;
  int key_stride;       // P(block_size)
  int value_stride;     // P(head_dim)
  int chunk_blocks;
  int chunk_keys;
  int score_stride;     // floats of one row's scores of a chunk
  int partial_stride;   // floats of one row's partial result: sums [value_stride], maximum, total
  int tile_tokens;
  float scale;

  explicit Geometry(const AttendArgs& a)
      : args(a),
        group(a.heads / a.kv_heads),
        block_size(int(a.block_size)),
        head_dim(a.head_dim),
        key_stride(int(pad(a.block_size))),
        value_stride(int(pad(a.head_dim))),
        chunk_blocks(int(max_of(1, kChunkKeys / a.block_size))),
        chunk_keys(chunk_blocks * block_size),
        score_stride(chunk_blocks * key_stride),
        partial_stride(value_stride + kPad),
        tile_tokens(int(max_of(1, kTileRows / group))),
        scale(1.0f / __builtin_sqrtf(float(a.head_dim))) {}

  uint16_t* keys(int64_t block, int kv_head) const { return args.k_cache + (block * args.kv_heads + kv_head) * head_dim * key_stride; }
  uint16_t* values(int64_t block, int kv_head) const {
    return args.v_cache + (block * args.kv_heads + kv_head) * block_size * value_stride;
  }
};

// Consecutive tokens of one sequence.
struct Tile {
  int64_t sequence, first_token, partial_row;  // partial_row: of its first chunk and head in the shared buffer, when split
  int tokens, chunks;
};

// Some chunks of one tile and key/value head.
struct Unit {
  int tile, kv_head, first_chunk, last_chunk;
};

// The blocks of a chunk, for one key/value head.
struct ChunkBlocks {
  const uint16_t* keys[kMaxChunkBlocks];
  const uint16_t* values[kMaxChunkBlocks];
};

// ---- writing ----

// Up to kLanes numbers.
void to_halves(const float* from, int count, uint16_t* to) {
  const Vec v = count >= kLanes ? load(from) : load_first(from, count);
  store_half(to, max(splat(-kLargestHalf), min(splat(kLargestHalf), v)));
}

void write_token(const Geometry& g, int64_t token) {
  const AttendArgs& a = g.args;
  const int64_t block = a.slots[token] / g.block_size, offset = a.slots[token] % g.block_size;
  uint16_t halves[kLanes];
  for (int h = 0; h < a.kv_heads; ++h) {
    const int64_t row = (token * a.kv_heads + h) * g.head_dim;
    uint16_t* keys = g.keys(block, h) + offset;
    uint16_t* values = g.values(block, h) + offset * g.value_stride;
    for (int d = 0; d < g.head_dim; d += kLanes) {
      const int count = int(min_of(kLanes, g.head_dim - d));
      to_halves(a.v + row + d, count, values + d);  // past head_dim this writes zeros into the padding
      to_halves(a.k + row + d, count, halves);
      for (int i = 0; i < count; ++i) keys[int64_t(d + i) * g.key_stride] = halves[i];
    }
  }
}

// ---- one chunk ----

// Scores of Rows queries against Width vectors of keys of one block. Meanwhile the block at `ahead` is fetched.
template <int Rows, int Width>
void score_keys(const Geometry& g, const float* queries, const uint16_t* keys, const uint16_t* ahead, float* scores) {
  Vec sums[Rows][Width];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) sums[r][w] = zero();
  for (int d = 0; d < g.head_dim; ++d) {
    __builtin_prefetch(ahead + d * g.key_stride);
    Vec key[Width];
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) key[w] = load_half(keys + d * g.key_stride + w * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec query = splat(queries[r * g.head_dim + d]);
#pragma GCC unroll 4
      for (int w = 0; w < Width; ++w) sums[r][w] = fma(query, key[w], sums[r][w]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) store(scores + r * g.score_stride + w * kLanes, sums[r][w]);
}

// Sums of values weighted by the exponentials of Rows rows, over `keys` keys and Width vectors of dimensions.
template <int Rows, int Width>
void sum_values(const Geometry& g, const float* weights, const uint16_t* const* values, int keys, int dimension, float* partial) {
  Vec sums[Rows][Width];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) sums[r][w] = zero();
  for (int done = 0; done < keys; done += g.block_size, ++values, weights += g.key_stride) {
    const int count = int(min_of(g.block_size, keys - done));
    const uint16_t* ahead = done + count < keys ? values[1] : values[0];
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int w = 0; w < Width; w += 32 / kLanes) __builtin_prefetch(ahead + int64_t(i) * g.value_stride + dimension + w * kLanes);
      Vec value[Width];
#pragma GCC unroll 4
      for (int w = 0; w < Width; ++w) value[w] = load_half(*values + int64_t(i) * g.value_stride + dimension + w * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Vec weight = splat(weights[r * g.score_stride + i]);
#pragma GCC unroll 4
        for (int w = 0; w < Width; ++w) sums[r][w] = fma(weight, value[w], sums[r][w]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < Width; ++w) store(partial + r * g.partial_stride + dimension + w * kLanes, sums[r][w]);
}

// Turns one row's scores of a chunk into exp(score - maximum): the first `visible` keys; 0 for the others up to `keys`.
void exponentiate(const Geometry& g, float* scores, int visible, int keys, float* maximum, float* total) {
  const Vec nothing = splat(-kInfinity);
  Vec top = nothing;
  for (int b = 0; b * g.block_size < keys; ++b) {
    const int block_keys = int(min_of(g.block_size, keys - b * g.block_size));
    const int seen = int(min_of(block_keys, visible - b * g.block_size));
    float* block = scores + b * g.key_stride;
    for (int i = 0; i < block_keys; i += kLanes) {
      const int left = seen - i;
      const Vec v = left >= kLanes ? load(block + i) : left > 0 ? keep_first(load(block + i), left, nothing) : nothing;
      if (left < kLanes) store(block + i, v);
      top = max(top, v);
    }
  }
  *maximum = reduce_max(top);
  if (visible <= 0) *maximum = 0;  // every score is -inf: the exponentials must become 0
  const Vec offset = splat(*maximum);
  Vec sum = zero();
  for (int b = 0; b * g.block_size < keys; ++b) {
    const int block_keys = int(min_of(g.block_size, keys - b * g.block_size));
    for (int i = 0; i < block_keys; i += kLanes) {
      float* at = scores + b * g.key_stride + i;
      const Vec e = exp(load(at) - offset);
      store(at, e);
      sum = sum + e;
    }
  }
  *total = reduce_add(sum);
}

// Partial results of all rows of a tile over one chunk. `visible[r]`: how many keys of the chunk row r sees, the most is `keys`.
void attend_chunk(const Geometry& g, const float* queries, int rows, const int* visible, int keys, const ChunkBlocks& blocks,
                  float* scores, float* partial) {
  for (int b = 0; b * g.block_size < keys; ++b) {
    const int vectors = int(ceil_div(min_of(g.block_size, keys - b * g.block_size), kLanes));
    for (int first = 0; first < vectors; first += kScoreWidth)
      visit_count<kScoreWidth>(vectors - first, [&](auto width) {
        const bool last = (b + 1) * g.block_size >= keys;
        const uint16_t* at = blocks.keys[b] + first * kLanes;
        const uint16_t* ahead = (last ? blocks.values[0] : blocks.keys[b + 1]) + first * kLanes;
        for (int r = 0; r < rows; r += kScoreRows)
          visit_count<kScoreRows>(rows - r, [&](auto count) {
            score_keys<count.value, width.value>(g, queries + r * g.head_dim, at, ahead,
                                                 scores + r * g.score_stride + b * g.key_stride + first * kLanes);
          });
      });
  }
  for (int r = 0; r < rows; ++r) {
    float* row = partial + r * g.partial_stride + g.value_stride;
    exponentiate(g, scores + r * g.score_stride, visible[r], keys, row, row + 1);
  }
  for (int r = 0; r < rows; r += kValueRows)
    visit_count<kValueRows>(rows - r, [&](auto count) {
      int most = 0;
      for (int i = r; i < r + count.value; ++i) most = int(max_of(most, visible[i]));
      for (int d = 0; d < g.value_stride; d += kValueWidth * kLanes)
        visit_count<kValueWidth>((g.value_stride - d) / kLanes, [&](auto width) {
          sum_values<count.value, width.value>(g, scores + r * g.score_stride, blocks.values, most, d,
                                               partial + r * g.partial_stride);
        });
    });
}

// Adds a later chunk's partial result of one row to what came before.
void merge(const Geometry& g, float* row, const float* later) {
  float *maximum = row + g.value_stride, *total = maximum + 1;
  const float later_maximum = later[g.value_stride], later_total = later[g.value_stride + 1];
  const float top = *maximum > later_maximum ? *maximum : later_maximum;
  const Vec keep = exp(splat(*maximum - top)), add = exp(splat(later_maximum - top));
  for (int d = 0; d < g.value_stride; d += kLanes) store(row + d, fma(load(later + d), add, load(row + d) * keep));
  *total = add[0] * later_total + keep[0] * *total;
  *maximum = top;
}

// ---- one unit ----

// Memory of one thread.
struct Scratch {
  float *queries, *scores, *partial, *later;
  int* visible;

  static int64_t floats(const Geometry& g, int64_t rows) {
    return pad(rows * (g.head_dim + g.score_stride + 2 * g.partial_stride) + kPad);
  }
  Scratch(const Geometry& g, int64_t rows, float* memory, int* visible_memory)
      : queries(memory),
        scores(queries + pad(rows * g.head_dim)),
        partial(scores + rows * g.score_stride),
        later(partial + rows * g.partial_stride),
        visible(visible_memory) {}
};

void load_queries(const Geometry& g, const Tile& tile, int kv_head, float* queries) {
  const int64_t count = int64_t(g.group) * g.head_dim;
  for (int t = 0; t < tile.tokens; ++t) {
    const float* from = g.args.q + ((tile.first_token + t) * g.args.kv_heads + kv_head) * count;
    for (int64_t i = 0; i < count; ++i) queries[t * count + i] = from[i] * g.scale;
  }
}

void write_out(const Geometry& g, const Tile& tile, int kv_head, const float* partial) {
  for (int r = 0; r < tile.tokens * g.group; ++r) {
    const float* row = partial + int64_t(r) * g.partial_stride;
    const int64_t token = tile.first_token + r / g.group, head = int64_t(kv_head) * g.group + r % g.group;
    float* out = g.args.out + (token * g.args.heads + head) * g.head_dim;
    const float scale = 1.0f / row[g.value_stride + 1];
    for (int d = 0; d < g.head_dim; ++d) out[d] = row[d] * scale;
  }
}

// How many keys of a chunk each row sees (not above zero: none).
void find_visible(const Geometry& g, const Tile& tile, int chunk, int* visible) {
  for (int r = 0; r < tile.tokens * g.group; ++r) {
    const int64_t context = int64_t(g.args.positions[tile.first_token + r / g.group]) + 1;
    visible[r] = int(min_of(g.chunk_keys, context - int64_t(chunk) * g.chunk_keys));
  }
}

void merge_rows(const Geometry& g, int rows, const int* visible, float* partial, const float* later) {
  for (int r = 0; r < rows; ++r)
    if (visible[r] > 0) merge(g, partial + int64_t(r) * g.partial_stride, later + int64_t(r) * g.partial_stride);
}

// The chunks of a unit, merged into `partial`.
void attend_unit(const Geometry& g, const Tile& tile, const Unit& unit, const Scratch& scratch, float* partial) {
  const int rows = tile.tokens * g.group;
  load_queries(g, tile, unit.kv_head, scratch.queries);
  for (int chunk = unit.first_chunk; chunk < unit.last_chunk; ++chunk) {
    find_visible(g, tile, chunk, scratch.visible);
    int keys = 0;
    for (int r = 0; r < rows; ++r) keys = int(max_of(keys, scratch.visible[r]));
    ChunkBlocks blocks;
    const int32_t* table = g.args.block_tables + tile.sequence * g.args.max_blocks + int64_t(chunk) * g.chunk_blocks;
    for (int b = 0; b * g.block_size < keys; ++b) {
      blocks.keys[b] = g.keys(table[b], unit.kv_head);
      blocks.values[b] = g.values(table[b], unit.kv_head);
    }
    const bool first = chunk == unit.first_chunk;
    attend_chunk(g, scratch.queries, rows, scratch.visible, keys, blocks, scratch.scores, first ? partial : scratch.later);
    if (!first) merge_rows(g, rows, scratch.visible, partial, scratch.later);
  }
}

// ---- the whole call ----

int64_t count_tiles(const Geometry& g) {
  int64_t tiles = 0;
  for (int64_t s = 0; s < g.args.sequences; ++s)
    tiles += ceil_div(g.args.seq_starts[s + 1] - g.args.seq_starts[s], g.tile_tokens);
  return tiles;
}

// Fills the tiles; returns the rows that a shared buffer of all partial results takes.
int64_t make_tiles(const Geometry& g, Tile* tiles) {
  int64_t partial_rows = 0;
  for (int64_t s = 0; s < g.args.sequences; ++s) {
    const int64_t end = g.args.seq_starts[s + 1];
    for (int64_t t = g.args.seq_starts[s]; t < end; t += g.tile_tokens) {
      const int tokens = int(min_of(g.tile_tokens, end - t));
      int64_t context = 0;
      for (int i = 0; i < tokens; ++i) context = max_of(context, int64_t(g.args.positions[t + i]) + 1);
      const int chunks = int(ceil_div(context, g.chunk_keys));
      *tiles++ = {s, t, partial_rows, tokens, chunks};
      partial_rows += int64_t(tokens) * g.args.heads * chunks;
    }
  }
  return partial_rows;
}

}  // namespace

void attend(ThreadPool& pool, const AttendArgs& args) {
  const Geometry g(args);
  pool.run(args.tokens, kPad, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) write_token(g, t);
  });

  const int64_t num_tiles = count_tiles(g);
  const Buffer<Tile> tiles(num_tiles);
  const int64_t partial_rows = make_tiles(g, tiles.data);
  int64_t tile_rows = 0, all_chunks = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    tile_rows = max_of(tile_rows, int64_t(tiles.data[i].tokens) * g.group);
    all_chunks += tiles.data[i].chunks;
  }

  // Few tiles: their chunks are computed apart, so that every thread has work, and merged by whoever finishes last.
  const bool split = num_tiles * args.kv_heads < kUnitsPerThread * pool.threads() && all_chunks > num_tiles &&
                     partial_rows * g.partial_stride <= kMaxSharedFloats;
  const Buffer<Unit> units((split ? all_chunks : num_tiles) * args.kv_heads);
  Unit* unit = units.data;
  for (int64_t i = num_tiles - 1; i >= 0; --i)  // the last tiles of a prompt have the most to do
    for (int h = 0; h < args.kv_heads; ++h) {
      const int chunks = tiles.data[i].chunks;
      for (int chunk = 0; chunk < chunks; chunk += split ? 1 : chunks) *unit++ = {int(i), h, chunk, split ? chunk + 1 : chunks};
    }

  const Buffer<float> shared(split ? partial_rows * g.partial_stride : 0);
  const Buffer<int> finished(num_tiles * args.kv_heads);
  for (int64_t i = 0; i < num_tiles * args.kv_heads; ++i) finished.data[i] = 0;
  const int64_t scratch_floats = Scratch::floats(g, tile_rows);
  const Buffer<float> scratch_memory(scratch_floats * pool.threads());
  const Buffer<int> visible_memory(tile_rows * pool.threads());

  pool.run(unit - units.data, 1, [&](int64_t begin, int64_t end, int thread) {
    const Scratch scratch(g, tile_rows, scratch_memory.data + thread * scratch_floats, visible_memory.data + thread * tile_rows);
    for (int64_t i = begin; i < end; ++i) {
      const Unit& u = units.data[i];
      const Tile& tile = tiles.data[u.tile];
      if (!split) {
        attend_unit(g, tile, u, scratch, scratch.partial);
        write_out(g, tile, u.kv_head, scratch.partial);
        continue;
      }
      const int rows = tile.tokens * g.group;
      const int64_t chunk_floats = int64_t(rows) * g.partial_stride;
      float* first = shared.data + tile.partial_row * g.partial_stride + u.kv_head * tile.chunks * chunk_floats;
      attend_unit(g, tile, u, scratch, first + u.first_chunk * chunk_floats);
      int* count = finished.data + int64_t(u.tile) * args.kv_heads + u.kv_head;
      if (__atomic_add_fetch(count, 1, __ATOMIC_ACQ_REL) < tile.chunks) continue;
      for (int chunk = 1; chunk < tile.chunks; ++chunk) {
        find_visible(g, tile, chunk, scratch.visible);
        merge_rows(g, rows, scratch.visible, first, first + chunk * chunk_floats);
      }
      write_out(g, tile, u.kv_head, first);
    }
  });
}

}  // namespace puna::PUNA_ISA
