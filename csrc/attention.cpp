// Causal attention over the paged cache (cache.hpp).
//
// Work is cut into tiles: some tokens of one sequence times the query heads that share one key/value head, so that each key and
// value that is read serves every row (token, head) of the tile. The context is cut into chunks of about 256 keys. Where a tile
// has many rows, a chunk is expanded to float32 once for all of them, within the core's own cache; where it has few (decoding),
// numbers are expanded as they are read. Chunks are merged in order (online softmax, Milakov & Gimelshein 2018; flash decoding,
// Dao et al. 2023).
//
// A row's result is always the same sequence of operations: over head_dim for a score, over the keys of a chunk for a sum,
// over chunks for the merge. So it depends neither on the tile it is in (decoding or prefill), nor on who computes which chunk.
#include <type_traits>

#include "attention_chunk.hpp"
#include "block_types.hpp"
#include "buffer.hpp"

namespace puna::PUNA_ISA {

namespace {

constexpr int kTileRows = 192;
constexpr int kStepRows = 48;   // rows of a tile whose scores are in memory at once
constexpr int kDirectRows = 8;  // tiles of more rows expand their chunks
constexpr int kUnitsPerThread = 4;  // with fewer tiles than this they are split
constexpr int64_t kMaxSharedFloats = int64_t(1) << 24;  // 64 MiB; with more to keep they aren't
constexpr int64_t kWriteGrain = 16;

// Consecutive tokens of one sequence.
struct Tile {
  int64_t sequence, first_token, partial_row;  // partial_row: of its first chunk and head in the shared buffer, when split
  int tokens, chunks;
};

// Some chunks of one tile and key/value head.
struct Unit {
  int tile, kv_head, first_chunk, last_chunk;
};

// Memory of one thread.
struct Scratch {
  float *queries, *scores, *partial, *later, *keys, *values;
  int* visible;
};

// One call, for one type of cache.
template <class Type>
struct Attention {
  const AttendArgs& args;
  const CacheLayout& layout;
  const Geometry g;
  const int tile_tokens;

  explicit Attention(const AttendArgs& a) : args(a), layout(*a.layout), g(a), tile_tokens(int(max_of(1, kTileRows / g.group))) {}

  void run(ThreadPool& pool) const;

 private:
  using Number = typename Type::Number;

  uint8_t* part(int64_t block, int kv_head) const { return args.layer + block * layout.block_bytes + kv_head * layout.head_bytes; }
  bool expands(int rows) const { return !std::is_same_v<Type, CacheF32> && rows > kDirectRows; }

  void write_token(int64_t token) const;
  void load_queries(const Tile& tile, int kv_head, float* queries) const;
  void find_visible(const Tile& tile, int chunk, int* visible) const;
  void attend_unit(const Tile& tile, const Unit& unit, const Scratch& scratch, float* partial) const;
  template <int MostRows, class As>
  void attend_rows(int rows, const HeadPart<As>* parts, bool first, const Scratch& scratch, float* partial) const;
  void merge_rows(int rows, const int* visible, float* partial, const float* later) const;
  void write_out(const Tile& tile, int kv_head, const float* partial) const;
  int64_t count_tiles() const;
  int64_t make_tiles(Tile* tiles) const;
};

template <class Type>
void Attention<Type>::write_token(int64_t token) const {
  const int64_t block = args.slots[token] / g.block_size, offset = args.slots[token] % g.block_size;
  Number rounded[kScaleGroup];
  for (int h = 0; h < layout.kv_heads; ++h) {
    const int64_t row = (token * layout.kv_heads + h) * g.head_dim;
    uint8_t* to = part(block, h);
    Number* keys = reinterpret_cast<Number*>(to) + offset;
    Number* values = reinterpret_cast<Number*>(to + layout.values) + offset * g.value_stride;
    uint16_t* key_scales = reinterpret_cast<uint16_t*>(to + layout.key_scales) + offset;
    uint16_t* value_scales = reinterpret_cast<uint16_t*>(to + layout.value_scales) + offset * (g.head_dim / kScaleGroup);
    for (int d = 0; d < g.head_dim; d += kScaleGroup) {
      const int count = int(min_of(kScaleGroup, g.head_dim - d)), scale = d / kScaleGroup;
      Type::round(args.k + row + d, count, rounded, key_scales + scale * g.key_stride);
      for (int i = 0; i < count; ++i) keys[int64_t(d + i) * g.key_stride] = rounded[i];
      Type::round(args.v + row + d, count, rounded, value_scales + scale);
      std::memcpy(values + d, rounded, size_t(count) * sizeof(Number));
    }
  }
}

template <class Type>
void Attention<Type>::load_queries(const Tile& tile, int kv_head, float* queries) const {
  const int64_t count = int64_t(g.group) * g.head_dim;
  const float scale = 1.0f / __builtin_sqrtf(float(g.head_dim));
  for (int t = 0; t < tile.tokens; ++t) {
    const float* from = args.q + ((tile.first_token + t) * layout.kv_heads + kv_head) * count;
    for (int64_t i = 0; i < count; ++i) queries[t * count + i] = from[i] * scale;
  }
}

template <class Type>
void Attention<Type>::write_out(const Tile& tile, int kv_head, const float* partial) const {
  for (int r = 0; r < tile.tokens * g.group; ++r) {
    const float* row = partial + int64_t(r) * g.partial_stride;
    const int64_t token = tile.first_token + r / g.group, head = int64_t(kv_head) * g.group + r % g.group;
    float* out = args.out + (token * args.heads + head) * g.head_dim;
    const float scale = 1.0f / row[g.value_stride + 1];
    for (int d = 0; d < g.head_dim; ++d) out[d] = row[d] * scale;
  }
}

// How many keys of a chunk each row sees (not above zero: none).
template <class Type>
void Attention<Type>::find_visible(const Tile& tile, int chunk, int* visible) const {
  for (int r = 0; r < tile.tokens * g.group; ++r) {
    const int64_t context = int64_t(args.positions[tile.first_token + r / g.group]) + 1;
    visible[r] = int(min_of(g.chunk_keys, context - int64_t(chunk) * g.chunk_keys));
  }
}

template <class Type>
void Attention<Type>::merge_rows(int rows, const int* visible, float* partial, const float* later) const {
  for (int r = 0; r < rows; ++r)
    if (visible[r] > 0) merge(g, partial + int64_t(r) * g.partial_stride, later + int64_t(r) * g.partial_stride);
}

// All rows of a tile over one chunk: stored to `partial` if it is their first, else merged into it.
template <class Type>
template <int MostRows, class As>
void Attention<Type>::attend_rows(int rows, const HeadPart<As>* parts, bool first, const Scratch& scratch, float* partial) const {
  for (int r = 0; r < rows; r += kStepRows) {
    const int count = int(min_of(kStepRows, rows - r));
    const int* visible = scratch.visible + r;
    int keys = 0;
    for (int i = 0; i < count; ++i) keys = int(max_of(keys, visible[i]));
    if (keys == 0) continue;
    float* to = partial + int64_t(r) * g.partial_stride;
    attend_chunk<MostRows>(g, scratch.queries + r * g.head_dim, count, visible, keys, parts, scratch.scores, first ? to : scratch.later);
    if (!first) merge_rows(count, visible, to, scratch.later);
  }
}

// The chunks of a unit, merged into `partial`.
template <class Type>
void Attention<Type>::attend_unit(const Tile& tile, const Unit& unit, const Scratch& scratch, float* partial) const {
  const int rows = tile.tokens * g.group;
  load_queries(tile, unit.kv_head, scratch.queries);
  for (int chunk = unit.first_chunk; chunk < unit.last_chunk; ++chunk) {
    find_visible(tile, chunk, scratch.visible);
    int keys = 0;
    for (int r = 0; r < rows; ++r) keys = int(max_of(keys, scratch.visible[r]));
    HeadPart<Type> parts[kMaxChunkBlocks];
    const int32_t* table = args.block_tables + tile.sequence * args.max_blocks + int64_t(chunk) * g.chunk_blocks;
    const int blocks = int(ceil_div(keys, g.block_size));
    for (int b = 0; b < blocks; ++b) parts[b] = head_part<Type>(layout, part(table[b], unit.kv_head));
    const bool first = chunk == unit.first_chunk;
    if (!expands(rows)) {
      attend_rows<std::is_same_v<Type, CacheF32> ? kScoreRows : kDirectRows>(rows, parts, first, scratch, partial);
      continue;
    }
    HeadPart<CacheF32> expanded[kMaxChunkBlocks];
    for (int b = 0; b < blocks; ++b) {
      float* to_keys = scratch.keys + int64_t(b) * g.head_dim * g.key_stride;
      float* to_values = scratch.values + int64_t(b) * g.block_size * g.value_stride;
      expand(g, parts[b], int(min_of(g.block_size, keys - b * g.block_size)), to_keys, to_values);
      expanded[b] = {to_keys, to_values, nullptr, nullptr};
    }
    attend_rows<kScoreRows>(rows, expanded, first, scratch, partial);
  }
}

template <class Type>
int64_t Attention<Type>::count_tiles() const {
  int64_t tiles = 0;
  for (int64_t s = 0; s < args.sequences; ++s) tiles += ceil_div(args.seq_starts[s + 1] - args.seq_starts[s], tile_tokens);
  return tiles;
}

// Fills the tiles; returns the rows that a shared buffer of all partial results takes.
template <class Type>
int64_t Attention<Type>::make_tiles(Tile* tiles) const {
  int64_t partial_rows = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t end = args.seq_starts[s + 1];
    for (int64_t t = args.seq_starts[s]; t < end; t += tile_tokens) {
      const int tokens = int(min_of(tile_tokens, end - t));
      int64_t context = 0;
      for (int i = 0; i < tokens; ++i) context = max_of(context, int64_t(args.positions[t + i]) + 1);
      const int chunks = int(ceil_div(context, g.chunk_keys));
      *tiles++ = {s, t, partial_rows, tokens, chunks};
      partial_rows += int64_t(tokens) * args.heads * chunks;
    }
  }
  return partial_rows;
}

template <class Type>
void Attention<Type>::run(ThreadPool& pool) const {
  pool.run(args.tokens, kWriteGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) write_token(t);
  });

  const int kv_heads = layout.kv_heads;
  const int64_t num_tiles = count_tiles();
  const Buffer<Tile> tiles(num_tiles);
  const int64_t partial_rows = make_tiles(tiles.data);
  int64_t tile_rows = 0, all_chunks = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    tile_rows = max_of(tile_rows, int64_t(tiles.data[i].tokens) * g.group);
    all_chunks += tiles.data[i].chunks;
  }

  // Few tiles: their chunks are computed apart, so that every thread has work, and merged by whoever finishes last.
  const bool split = num_tiles * kv_heads < kUnitsPerThread * pool.threads() && all_chunks > num_tiles &&
                     partial_rows * g.partial_stride <= kMaxSharedFloats;
  const Buffer<Unit> units((split ? all_chunks : num_tiles) * kv_heads);
  Unit* unit = units.data;
  for (int64_t i = num_tiles - 1; i >= 0; --i)  // the last tiles of a prompt have the most to do
    for (int h = 0; h < kv_heads; ++h) {
      const int chunks = tiles.data[i].chunks;
      for (int chunk = 0; chunk < chunks; chunk += split ? 1 : chunks) *unit++ = {int(i), h, chunk, split ? chunk + 1 : chunks};
    }

  const Buffer<float> shared(split ? partial_rows * g.partial_stride : 0);
  const Buffer<int> finished(num_tiles * kv_heads);
  for (int64_t i = 0; i < num_tiles * kv_heads; ++i) finished.data[i] = 0;
  const int64_t step_rows = min_of(tile_rows, kStepRows);
  const bool expand = expands(int(tile_rows));
  const int64_t sizes[] = {tile_rows * g.head_dim, step_rows * g.score_stride, tile_rows * g.partial_stride, step_rows * g.partial_stride,
                           expand ? int64_t(g.head_dim) * g.score_stride : 0, expand ? int64_t(g.chunk_keys) * g.value_stride : 0};
  int64_t scratch_floats = 0;
  for (int64_t size : sizes) scratch_floats += ceil_div(size, 16) * 16;
  const Buffer<float> scratch_memory(scratch_floats * pool.threads());
  const Buffer<int> visible_memory(tile_rows * pool.threads());

  pool.run(unit - units.data, 1, [&](int64_t begin, int64_t end, int thread) {
    float* parts[6];
    float* memory = scratch_memory.data + thread * scratch_floats;
    for (int i = 0; i < 6; ++i) parts[i] = memory, memory += ceil_div(sizes[i], 16) * 16;
    const Scratch scratch{parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], visible_memory.data + thread * tile_rows};
    for (int64_t i = begin; i < end; ++i) {
      const Unit& u = units.data[i];
      const Tile& tile = tiles.data[u.tile];
      if (!split) {
        attend_unit(tile, u, scratch, scratch.partial);
        write_out(tile, u.kv_head, scratch.partial);
        continue;
      }
      const int rows = tile.tokens * g.group;
      const int64_t chunk_floats = int64_t(rows) * g.partial_stride;
      float* first = shared.data + tile.partial_row * g.partial_stride + u.kv_head * tile.chunks * chunk_floats;
      attend_unit(tile, u, scratch, first + u.first_chunk * chunk_floats);
      int* count = finished.data + int64_t(u.tile) * kv_heads + u.kv_head;
      if (__atomic_add_fetch(count, 1, __ATOMIC_ACQ_REL) < tile.chunks) continue;
      for (int chunk = 1; chunk < tile.chunks; ++chunk) {
        find_visible(tile, chunk, scratch.visible);
        merge_rows(rows, scratch.visible, first, first + chunk * chunk_floats);
      }
      write_out(tile, u.kv_head, first);
    }
  });
}

}  // namespace

void attend(ThreadPool& pool, const AttendArgs& args) {
  switch (args.layout->type) {
    case kF32: return Attention<CacheF32>(args).run(pool);
    case kF16: return Attention<CacheF16>(args).run(pool);
    case kBF16: return Attention<CacheBF16>(args).run(pool);
    case kQ8_0: return Attention<CacheQ8>(args).run(pool);
  }
}

}  // namespace puna::PUNA_ISA
