// The whole native surface on one page. Plain buffers in, plain buffers out: nothing here owns memory or knows a model,
// a tokenizer or a file. Every function is thread-parallel over `pool` and releases no locks of its own.
//
// Each kernel source is compiled once per instruction set (the flags are in CMakeLists.txt) and defines its kernels inside
// `namespace puna::PUNA_ISA`; isa_table.cpp gathers them and dispatch.cpp picks one table at load. All activations are
// row-major float32. K inner size, N output rows, T tokens.
//
// Rules for kernel sources (those compiled per instruction set):
// - Everything they define, and every header they share, lives in `namespace puna::PUNA_ISA`. An inline function or template
//   outside it, std:: containers and algorithms included, may be merged by the linker with a copy built for another CPU.
// - Ask `__AVX512F__`, `__AVX2__`, `__ARM_FEATURE_DOTPROD` for the instruction set. Floats are contracted nowhere: write fma where you want one.
// - A result never depends on the batch around it, nor on the number of threads: fixed order of float operations.
// - Parallel loops: pool.run(count, grain, [&](int64_t begin, int64_t end, int thread) { … }); see threadpool.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache.hpp"
#include "threadpool.hpp"

namespace puna {

// One output of a linear layer. `packed` is in the panel layout of panel.hpp. `bias` and `residual` may be null.
struct LinearTarget {
  int type;                // ggml type number of the source weight
  int64_t rows;            // N
  const uint8_t* packed;
  const float* bias;       // [N]
  const float* residual;   // [T, N]
  float* out;              // [T, N]
};

// What one adapter adds to one output of a linear layer: scale x (x A^T) B^T.
struct LowRank {
  const float* down;  // A [rank, K]
  const float* up;    // B^T [rank, N]
  int64_t rank;       // 0: nothing
  float scale;
};

// One output of a linear layer, and what every adapter adds to it.
struct LowRankTarget {
  int64_t rows;            // N
  const LowRank* changes;  // by the adapter's number; null: no adapter changes it
  float* out;              // [T, N]
};

// The tokens of a step that use one adapter.
struct AdapterTokens {
  int32_t adapter;
  const int32_t* tokens;
  int64_t count;
};

// Paged attention over one layer of the cache (cache.hpp).
struct AttendArgs {
  const float* q;              // [T, heads * head_dim]
  const float* k;              // [T, kv_heads * head_dim]
  const float* v;              // [T, kv_heads * head_dim]
  float* out;                  // [T, heads * head_dim]
  const CacheLayout* layout;
  uint8_t* layer;              // this layer's part of the first block; the next block's is layout->block_bytes further
  int heads;
  const int32_t* positions;    // [T]
  const int32_t* slots;        // [T]
  const int32_t* seq_starts;   // [S + 1]
  const int32_t* block_tables; // [S, max_blocks]
  int64_t tokens, sequences, max_blocks;
};

// One row to sample; fields as in puna.ops.protocol.SamplingRow.
struct SampleRow {
  float temperature, top_p, min_p, typical_p, repeat_penalty, presence_penalty, frequency_penalty;
  int32_t top_k, top_logprobs;
  const int32_t* history;
  int64_t history_length;
  const int32_t* bias_ids;
  const float* bias_values;
  int64_t bias_length;
  const uint32_t* allowed;  // null: all
  double uniform;
  int32_t* token;           // out
  float* logprob;           // out; null: not wanted
  int32_t* top_ids;         // out [top_logprobs]
  float* top_values;        // out [top_logprobs]
};

// Steps of training between the matrix products. Number: float, or the bits of a bfloat16. Arithmetic is float32. An output may be
// the input of its shape, in place.
template <class Number>
struct TrainingKernels {
  // x / sqrt(mean(x^2) + eps) * weight by row of x [T, K]; inverse [T] gets what each row was multiplied by
  void (*norm)(ThreadPool& pool, const Number* x, const float* weight, float eps, int64_t tokens, int64_t columns, Number* out,
               float* inverse);
  void (*norm_backward)(ThreadPool& pool, const Number* x, const float* weight, const float* inverse, const Number* gradient,
                        int64_t tokens, int64_t columns, Number* x_gradient);
  // every head of x [T, heads * 2 * half] turned by the angles [T, half], or back
  void (*rotate)(ThreadPool& pool, const Number* x, const float* cosines, const float* sines, bool back, int64_t tokens,
                 int64_t heads, int64_t half, Number* out);
  // silu(gate) * up
  void (*gate)(ThreadPool& pool, const Number* gate, const Number* up, int64_t count, Number* out);
  void (*gate_backward)(ThreadPool& pool, const Number* gate, const Number* up, const Number* gradient, int64_t count,
                        Number* gate_gradient, Number* up_gradient);
  // losses [R] = weight * -log softmax(logits)[target]; logits [R, V] become the losses' gradients where asked
  void (*cross_entropy)(ThreadPool& pool, Number* logits, const int64_t* targets, const float* weights, int64_t rows,
                        int64_t vocabulary, bool gradients, float* losses);
  // scores [n, queries, heads, keys], of which the last query is at the last key's position -> softmax(scale * scores),
  // causal; scores are overwritten
  void (*causal_softmax)(ThreadPool& pool, float* scores, float scale, int64_t count, int64_t queries, int64_t heads,
                         int64_t keys, Number* weights);
  // gradients of weights [rows, keys] become those of the unscaled scores
  void (*softmax_backward)(ThreadPool& pool, const Number* weights, float scale, int64_t rows, int64_t keys, Number* gradients);
};

struct Kernels {
  const char* name;
  // linear.cpp
  void (*pack)(ThreadPool& pool, int type, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* packed);
  void (*linears)(ThreadPool& pool, const float* x, int64_t tokens, int64_t columns, const LinearTarget* targets, int count);
  // low_rank.cpp
  void (*add_low_rank)(ThreadPool& pool, const float* x, int64_t columns, const AdapterTokens* groups, int64_t group_count,
                       const LowRankTarget* targets, int count);
  // decode.cpp: encoded rows -> float32 (embedding lookup, fallbacks)
  void (*decode_rows)(ThreadPool& pool, int type, int64_t columns, const uint8_t* source, const int32_t* index, int64_t count,
                      float* out);
  // encode.cpp: float32 rows -> blocks; false where a number can't be held
  bool (*encode_rows)(ThreadPool& pool, int type, int64_t rows, int64_t columns, const float* x, const float* importance,
                      uint8_t* out);
  // elementwise.cpp
  void (*rms_norm)(ThreadPool& pool, const float* x, const float* weight, float eps, int64_t tokens, int64_t columns, float* out);
  void (*rope_angles)(ThreadPool& pool, const int32_t* positions, const float* inverse_frequencies, int64_t stride, float scale,
                      int64_t tokens, int64_t half, float* cosines, float* sines);
  void (*rope)(ThreadPool& pool, float* x, const float* cosines, const float* sines, int64_t tokens, int heads, int head_dim);
  void (*swiglu)(ThreadPool& pool, const float* gate, const float* up, int64_t tokens, int64_t columns, float* out);
  // training.cpp
  const TrainingKernels<float>* (*float32_training)();
  const TrainingKernels<uint16_t>* (*bfloat16_training)();
  // attention.cpp
  void (*attend)(ThreadPool& pool, const AttendArgs& args);
  // sampling.cpp
  void (*sample)(ThreadPool& pool, const float* logits, int64_t vocabulary, const SampleRow* rows, int64_t count);
  // limits.cpp: what the machine can do at best; the products return the operations they did
  void (*read_memory)(ThreadPool& pool, const uint8_t* data, int64_t bytes);
  int64_t (*multiply_int8)(ThreadPool& pool, int64_t rounds);
  int64_t (*multiply_float32)(ThreadPool& pool, int64_t rounds);
};

// Every kernel of the table, in its order.
#define PUNA_KERNEL_NAMES(X) \
  X(pack) X(linears) X(add_low_rank) X(decode_rows) X(encode_rows) X(rms_norm) X(rope_angles) X(rope) X(swiglu) \
  X(float32_training) X(bfloat16_training) X(attend) X(sample) X(read_memory) X(multiply_int8) X(multiply_float32)

// The names of all tables, best first. dispatch.cpp says which of them a machine can run.
constexpr const char* kInstructionSets[] = {"avx512bf16", "avx512", "avx2", "neon", "portable"};
constexpr int kInstructionSetCount = sizeof kInstructionSets / sizeof *kInstructionSets;
// The table of that name; null where this machine can't run it.
const Kernels* find_kernels(const char* name);
// Bytes of the packed form of a [rows, columns] weight; 0 when the type has no packed form.
int64_t packed_bytes(int type, int64_t rows, int64_t columns);

}  // namespace puna
