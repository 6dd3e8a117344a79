// What adapters add to the outputs of linear layers (Hu et al. 2021), for the tokens that use one. First the products of each
// token with the rows of A (`down`), then those with the rows of Bᵀ (`up`): both parallel over adapters, outputs and blocks of each.
//
// A product is one sum over lanes, in the order of the columns, and what is added to an output is one sum in the order of
// the ranks: the same operations whatever the tile around them.
#include "buffer.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace puna::PUNA_ISA {
namespace {

constexpr int kTokens = 4, kRanks = 4;   // of a tile of products
constexpr int kVectors = 2;              // of a row of outputs that are summed at once
constexpr int64_t kBlockTokens = 32;     // the inputs of a block of tokens stay in a near cache
constexpr int64_t kBlockRows = 256;      // outputs of one work item
constexpr int64_t kGrain = 32768;        // multiply-adds for one thread to take at a time

// Some tokens of one adapter, and one output.
struct Part {
  const LowRank* change;
  const int32_t* tokens;
  int64_t count;
  float* products;  // [count, rank], times the scale
  int64_t rows;
  float* out;
};

// A part, and the first of the ranks or outputs to compute.
struct Item {
  const Part* part;
  int64_t first;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(tokens of a part, output, change) for each combination that changes something.
template <class Body>
void for_each_part(const AdapterTokens* groups, int64_t group_count, const LowRankTarget* targets, int count, const Body& body) {
  for (int64_t g = 0; g < group_count; g++)
    for (int i = 0; i < count; i++) {
      const LowRank* change = targets[i].changes ? targets[i].changes + groups[g].adapter : nullptr;
      if (!change || change->rank == 0) continue;
      for (int64_t t = 0; t < groups[g].count; t += kBlockTokens)
        body(groups[g].tokens + t, at_most(groups[g].count - t, kBlockTokens), targets[i], *change);
    }
}

template <int M, int R>
void multiply_down(const float* x, int64_t columns, const int32_t* tokens, const LowRank& change, int64_t rank, float* products) {
  const float *inputs[M], *down = change.down + rank * columns;
  for (int m = 0; m < M; m++) inputs[m] = x + tokens[m] * columns;
  Vec acc[M][R];
  PUNA_UNROLL
  for (int m = 0; m < M; m++)
    PUNA_UNROLL
    for (int r = 0; r < R; r++) acc[m][r] = zero();
  const auto add = [&](const auto& load_at) __attribute__((always_inline)) {
    Vec a[R];
    PUNA_UNROLL
    for (int r = 0; r < R; r++) a[r] = load_at(down + r * columns);
    PUNA_UNROLL
    for (int m = 0; m < M; m++) {
      const Vec v = load_at(inputs[m]);
      PUNA_UNROLL
      for (int r = 0; r < R; r++) acc[m][r] = fma(a[r], v, acc[m][r]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) add([i](const float* row) { return load(row + i); });
  if (const int rest = int(columns - i); rest > 0) add([i, rest](const float* row) { return load_first(row + i, rest); });
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) products[m * change.rank + rank + r] = change.scale * reduce_add(acc[m][r]);
}

// Adds to `lanes` (at most N vectors) outputs from `row` on of M tokens.
template <int M, int N>
void add_up(const Part& part, int64_t token, int64_t row, int lanes) {
  const int64_t rank = part.change->rank;
  const float *up = part.change->up + row, *products = part.products + token * rank;
  const auto load_lanes = [lanes](const float* p, int n) __attribute__((always_inline)) {
    return lanes >= (n + 1) * kLanes ? load(p + n * kLanes) : load_first(p + n * kLanes, lanes - n * kLanes);
  };
  Vec acc[M][N];
  PUNA_UNROLL
  for (int m = 0; m < M; m++)
    PUNA_UNROLL
    for (int n = 0; n < N; n++) acc[m][n] = zero();
  for (int64_t r = 0; r < rank; r++, up += part.rows) {
    Vec b[N];
    PUNA_UNROLL
    for (int n = 0; n < N; n++) b[n] = load_lanes(up, n);
    PUNA_UNROLL
    for (int m = 0; m < M; m++) {
      const Vec product = splat(products[m * rank + r]);
      PUNA_UNROLL
      for (int n = 0; n < N; n++) acc[m][n] = fma(b[n], product, acc[m][n]);
    }
  }
  for (int m = 0; m < M; m++) {
    float* out = part.out + part.tokens[token + m] * part.rows + row;
    for (int n = 0; n < N; n++) {
      const Vec sum = load_lanes(out, n) + acc[m][n];
      if (lanes >= (n + 1) * kLanes)
        store(out + n * kLanes, sum);
      else
        store_first(out + n * kLanes, sum, lanes - n * kLanes);
    }
  }
}

void multiply_down(const float* x, int64_t columns, const Part& part, int64_t rank) {
  for (int64_t t = 0; t < part.count; t += kTokens)
    visit_count<kTokens>(part.count - t, [&](auto tokens) {
      visit_count<kRanks>(part.change->rank - rank, [&](auto ranks) {
        multiply_down<tokens.value, ranks.value>(x, columns, part.tokens + t, *part.change, rank, part.products + t * part.change->rank);
      });
    });
}

void add_up(const Part& part, int64_t first) {
  const int64_t end = at_most(first + kBlockRows, part.rows);
  for (int64_t t = 0; t < part.count; t += kTokens)
    visit_count<kTokens>(part.count - t, [&](auto tokens) {
      for (int64_t row = first; row < end; row += kVectors * kLanes) {
        const int lanes = int(at_most(end - row, kVectors * kLanes));
        if (lanes > kLanes)
          add_up<tokens.value, kVectors>(part, t, row, lanes);
        else
          add_up<tokens.value, 1>(part, t, row, lanes);
      }
    });
}

}  // namespace

void add_low_rank(ThreadPool& pool, const float* x, int64_t columns, const AdapterTokens* groups, int64_t group_count,
                  const LowRankTarget* targets, int count) {
  int64_t parts = 0, products = 0, down_items = 0, up_items = 0, down_work = 0, up_work = 0;
  for_each_part(groups, group_count, targets, count, [&](const int32_t*, int64_t tokens, const LowRankTarget& target, const LowRank& change) {
    parts++;
    products += tokens * change.rank;
    down_items += ceil_div(change.rank, kRanks);
    up_items += ceil_div(target.rows, kBlockRows);
    down_work += tokens * change.rank * columns;
    up_work += tokens * change.rank * target.rows;
  });
  if (parts == 0) return;
  const Buffer<Part> part_list(parts);
  const Buffer<Item> items(down_items + up_items);
  const Buffer<float> memory(products);
  Part* part = part_list.data;
  Item *down = items.data, *up = items.data + down_items;
  float* free = memory.data;
  for_each_part(groups, group_count, targets, count,
                [&](const int32_t* tokens, int64_t token_count, const LowRankTarget& target, const LowRank& change) {
                  *part = {&change, tokens, token_count, free, target.rows, target.out};
                  free += token_count * change.rank;
                  for (int64_t r = 0; r < change.rank; r += kRanks) *down++ = {part, r};
                  for (int64_t r = 0; r < target.rows; r += kBlockRows) *up++ = {part, r};
                  part++;
                });
  pool.run(down_items, ceil_div(kGrain * down_items, down_work), [&](int64_t begin, int64_t end, int) {
    for (const Item* item = items.data + begin; item < items.data + end; item++) multiply_down(x, columns, *item->part, item->first);
  });
  pool.run(up_items, ceil_div(kGrain * up_items, up_work), [&](int64_t begin, int64_t end, int) {
    for (const Item* item = items.data + down_items + begin; item < items.data + down_items + end; item++) add_up(*item->part, item->first);
  });
}

}  // namespace puna::PUNA_ISA
