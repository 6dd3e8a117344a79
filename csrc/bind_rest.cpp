// The kernels other than the linear layers, as methods of Native. All arrays are C-contiguous; shapes stand with each method.
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "bind.hpp"
#include "block_types.hpp"

namespace puna {
namespace {

using Floats = Array<float, 2>;
using ConstFloats = Array<const float, 2>;
using FloatVector = Array<const float, 1>;
using Ints = Array<const int32_t, 1>;

template <class A>
bool has_shape(const A& array, size_t rows, size_t columns) {
  return array.shape(0) == rows && array.shape(1) == columns;
}

// source uint8[rows, row bytes], index int32[n] or None (every row) -> out float32[n, columns]
void decode_rows(Native& native, int type, const Array<const uint8_t, 2>& source, const std::optional<Ints>& index,
                 const Floats& out) {
  const BlockShape shape = block_shape(type);
  const int64_t columns = int64_t(out.shape(1)), rows = int64_t(source.shape(0)), count = int64_t(out.shape(0));
  check(shape.numbers > 0, "decode_rows: unknown type");
  check(columns % shape.numbers == 0 && int64_t(source.shape(1)) == columns / shape.numbers * shape.bytes,
        "decode_rows: the source's rows don't hold as many numbers as the output's");
  check(count == (index ? int64_t(index->shape(0)) : rows), "decode_rows: as many output rows as indices are needed");
  if (index)
    for (int64_t i = 0; i < count; ++i) check(index->data()[i] >= 0 && index->data()[i] < rows, "decode_rows: an index is out of range");
  const uint8_t* from = source.data();
  const int32_t* which = index ? index->data() : nullptr;
  float* to = out.data();
  nb::gil_scoped_release release;
  if (columns > 0) native.kernels->decode_rows(native.pool, type, columns, from, which, count, to);
}

// x float32[rows, columns], importance float32[columns] or None -> out uint8[rows, row bytes]; whether every number could be held
bool encode_rows(Native& native, int type, const ConstFloats& x, const std::optional<FloatVector>& importance,
                 const Array<uint8_t, 2>& out) {
  const BlockShape shape = block_shape(type);
  const int64_t rows = int64_t(x.shape(0)), columns = int64_t(x.shape(1));
  check(shape.numbers > 1 && columns % shape.numbers == 0, "encode_rows: no whole number of blocks in a row");
  check(has_shape(out, size_t(rows), size_t(columns / shape.numbers * shape.bytes)), "encode_rows: the output has another shape");
  check(!importance || int64_t(importance->shape(0)) == columns, "encode_rows: importance is for each column");
  const float *from = x.data(), *weights = importance ? importance->data() : nullptr;
  uint8_t* to = out.data();
  nb::gil_scoped_release release;
  return rows == 0 || columns == 0 || native.kernels->encode_rows(native.pool, type, rows, columns, from, weights, to);
}

// x [T, n], weight [n] -> out [T, n], which may be x
void rms_norm(Native& native, const ConstFloats& x, const FloatVector& weight, float eps, const Floats& out) {
  const size_t tokens = x.shape(0), columns = x.shape(1);
  check(columns > 0 && weight.shape(0) == columns && has_shape(out, tokens, columns), "rms_norm: shapes don't agree");
  const float *from = x.data(), *scale = weight.data();
  float* to = out.data();
  nb::gil_scoped_release release;
  native.kernels->rms_norm(native.pool, from, scale, eps, int64_t(tokens), int64_t(columns), to);
}

// positions [T], inverse_frequencies [d / 2] or [T, d / 2] -> cosines, sines [T, d / 2]
void rope_angles(Native& native, const Ints& positions, const nb::ndarray<const float, nb::c_contig, nb::device::cpu>& inverse_frequencies,
                 float scale, const Floats& cosines, const Floats& sines) {
  const size_t tokens = positions.shape(0), half = cosines.shape(1), dimensions = inverse_frequencies.ndim();
  check((dimensions == 1 || (dimensions == 2 && inverse_frequencies.shape(0) == tokens)) &&
            inverse_frequencies.shape(dimensions - 1) == half && has_shape(cosines, tokens, half) && has_shape(sines, tokens, half),
        "rope_angles: shapes don't agree");
  const int32_t* at = positions.data();
  const float* frequencies = inverse_frequencies.data();
  float *cosine = cosines.data(), *sine = sines.data();
  nb::gil_scoped_release release;
  native.kernels->rope_angles(native.pool, at, frequencies, dimensions == 1 ? 0 : int64_t(half), scale, int64_t(tokens), int64_t(half),
                              cosine, sine);
}

// x [T, heads * d], in place; cosines and sines [T, d / 2]
void rope(Native& native, const Floats& x, const ConstFloats& cosines, const ConstFloats& sines) {
  const size_t tokens = x.shape(0), columns = x.shape(1), half = cosines.shape(1);
  check(half > 0 && columns > 0 && columns % (2 * half) == 0 && has_shape(cosines, tokens, half) && has_shape(sines, tokens, half),
        "rope: shapes don't agree");
  float* data = x.data();
  const float *cosine = cosines.data(), *sine = sines.data();
  nb::gil_scoped_release release;
  native.kernels->rope(native.pool, data, cosine, sine, int64_t(tokens), int(columns / (2 * half)), int(2 * half));
}

// gate, up [T, n] -> out [T, n], which may be either
void swiglu(Native& native, const ConstFloats& gate, const ConstFloats& up, const Floats& out) {
  const size_t tokens = gate.shape(0), columns = gate.shape(1);
  check(has_shape(up, tokens, columns) && has_shape(out, tokens, columns), "swiglu: shapes don't agree");
  const float *g = gate.data(), *u = up.data();
  float* to = out.data();
  nb::gil_scoped_release release;
  native.kernels->swiglu(native.pool, g, u, int64_t(tokens), int64_t(columns), to);
}

// q [T, H d], k and v [T, G d] -> out [T, H d]; positions, slots [T], seq_starts [S + 1], block_tables [S, max_blocks]
void attend(Native& native, const Cache& cache, int layer, const ConstFloats& q, const ConstFloats& k, const ConstFloats& v,
            const Floats& out, const Ints& positions, const Ints& slots, const Ints& seq_starts,
            const Array<const int32_t, 2>& block_tables) {
  const CacheLayout& layout = cache.layout;
  const size_t tokens = q.shape(0), head_dim = size_t(layout.head_dim), kv_width = size_t(layout.kv_heads) * head_dim;
  check(layer >= 0 && layer < layout.layers, "attend: the cache has no such layer");
  check(q.shape(1) > 0 && q.shape(1) % kv_width == 0, "attend: q's width is not a multiple of kv heads times head_dim");
  check(has_shape(k, tokens, kv_width) && has_shape(v, tokens, kv_width) && has_shape(out, tokens, q.shape(1)),
        "attend: shapes of q, k, v and out don't agree");
  check(positions.shape(0) == tokens && slots.shape(0) == tokens && seq_starts.shape(0) == block_tables.shape(0) + 1,
        "attend: shapes of the batch don't agree");
  const AttendArgs args{
      .q = q.data(),
      .k = k.data(),
      .v = v.data(),
      .out = out.data(),
      .layout = &layout,
      .layer = cache.layer(layer),
      .heads = int(q.shape(1) / head_dim),
      .positions = positions.data(),
      .slots = slots.data(),
      .seq_starts = seq_starts.data(),
      .block_tables = block_tables.data(),
      .tokens = int64_t(tokens),
      .sequences = int64_t(block_tables.shape(0)),
      .max_blocks = int64_t(block_tables.shape(1)),
  };
  nb::gil_scoped_release release;
  check_batch(args);
  native.kernels->attend(native.pool, args);
}

// What one SampleRow points to.
struct RowMemory {
  std::optional<Ints> history;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::optional<Array<const uint32_t, 1>> allowed;
  int32_t token;
  float logprob;
  std::vector<int32_t> top_ids;
  std::vector<float> top_values;
};

// The places of SamplingRow's fields.
enum Field { kTemperature, kTopK, kTopP, kMinP, kTypicalP, kRepeatPenalty, kPresencePenalty, kFrequencyPenalty, kHistory, kBias, kAllowed,
             kUniform, kLogprob, kTopLogprobs, kFieldCount };

SampleRow read_row(const nb::tuple& row, int64_t vocabulary, RowMemory& memory) {
  check(row.size() == kFieldCount, "sample: not a SamplingRow");
  const auto at = [&](Field field) { return nb::object(row[size_t(field)]); };
  const auto number = [&](Field field) { return nb::cast<double>(at(field)); };
  if (!at(kHistory).is_none()) memory.history = nb::cast<Ints>(at(kHistory));
  if (!at(kBias).is_none())
    for (auto [id, value] : nb::cast<nb::dict>(at(kBias))) {
      memory.bias_ids.push_back(nb::cast<int32_t>(id));
      memory.bias_values.push_back(float(nb::cast<double>(value)));
    }
  if (!at(kAllowed).is_none()) {
    memory.allowed = nb::cast<Array<const uint32_t, 1>>(at(kAllowed));
    check(int64_t(memory.allowed->shape(0)) >= (vocabulary + 31) / 32, "sample: the allowed mask is shorter than the vocabulary");
  }
  const int64_t top = nb::cast<int64_t>(at(kTopLogprobs)), top_k = nb::cast<int64_t>(at(kTopK));
  memory.top_ids.resize(size_t(top < 0 ? 0 : top < vocabulary ? top : vocabulary));
  memory.top_values.resize(memory.top_ids.size());
  return {
      .temperature = float(number(kTemperature)),
      .top_p = float(number(kTopP)),
      .min_p = float(number(kMinP)),
      .typical_p = float(number(kTypicalP)),
      .repeat_penalty = float(number(kRepeatPenalty)),
      .presence_penalty = float(number(kPresencePenalty)),
      .frequency_penalty = float(number(kFrequencyPenalty)),
      .top_k = int32_t(top_k < vocabulary ? top_k : 0),
      .top_logprobs = int32_t(memory.top_ids.size()),
      .history = memory.history ? memory.history->data() : nullptr,
      .history_length = memory.history ? int64_t(memory.history->shape(0)) : 0,
      .bias_ids = memory.bias_ids.data(),
      .bias_values = memory.bias_values.data(),
      .bias_length = int64_t(memory.bias_ids.size()),
      .allowed = memory.allowed ? memory.allowed->data() : nullptr,
      .uniform = number(kUniform),
      .token = &memory.token,
      .logprob = nb::cast<bool>(at(kLogprob)) || top > 0 ? &memory.logprob : nullptr,
      .top_ids = memory.top_ids.data(),
      .top_values = memory.top_values.data(),
  };
}

// logits [R, V], as many SamplingRow -> (token, logprob, [(token, logprob), ...]) of each
nb::list sample(Native& native, const ConstFloats& logits, const nb::sequence& rows) {
  const int64_t count = int64_t(logits.shape(0)), vocabulary = int64_t(logits.shape(1));
  check(int64_t(nb::len(rows)) == count, "sample: as many rows as rows of logits are needed");
  check(vocabulary > 0 && vocabulary < INT32_MAX, "sample: the vocabulary is empty or too large");
  std::vector<RowMemory> memory(static_cast<size_t>(count));
  std::vector<SampleRow> samples;
  for (int64_t i = 0; i < count; ++i) samples.push_back(read_row(nb::cast<nb::tuple>(rows[size_t(i)]), vocabulary, memory[size_t(i)]));
  {
    const float* data = logits.data();
    nb::gil_scoped_release release;
    native.kernels->sample(native.pool, data, vocabulary, samples.data(), count);
  }
  nb::list result;
  for (size_t row = 0; row < memory.size(); ++row) {
    const RowMemory& m = memory[row];
    nb::list top;
    for (size_t i = 0; i < m.top_ids.size() && m.top_ids[i] >= 0; ++i)
      top.append(nb::make_tuple(m.top_ids[i], double(m.top_values[i])));
    result.append(nb::make_tuple(m.token, samples[row].logprob ? nb::object(nb::float_(double(m.logprob))) : nb::object(nb::none()), top));
  }
  return result;
}

// data uint8[n] of a multiple of 64 bytes, aligned to 64
void read_memory(Native& native, const Array<const uint8_t, 1>& data) {
  check(data.size() % 64 == 0 && reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "read_memory: not whole, aligned lines of 64 bytes");
  const uint8_t* from = data.data();
  const int64_t bytes = int64_t(data.size());
  nb::gil_scoped_release release;
  native.kernels->read_memory(native.pool, from, bytes);
}

int64_t multiply_int8(Native& native, int64_t rounds) {
  nb::gil_scoped_release release;
  return native.kernels->multiply_int8(native.pool, rounds);
}

int64_t multiply_float32(Native& native, int64_t rounds) {
  nb::gil_scoped_release release;
  return native.kernels->multiply_float32(native.pool, rounds);
}

}  // namespace

void check_batch(const AttendArgs& a) {
  const int64_t block_size = a.layout->block_size, slots = a.layout->num_blocks * block_size;
  check(a.seq_starts[0] == 0 && a.seq_starts[a.sequences] == a.tokens, "attend: seq_starts don't cover the tokens");
  for (int64_t s = 0; s < a.sequences; ++s) {
    check(a.seq_starts[s] <= a.seq_starts[s + 1], "attend: seq_starts must not fall");
    int64_t context = 0;
    for (int64_t t = a.seq_starts[s]; t < a.seq_starts[s + 1]; ++t) {
      check(a.positions[t] >= 0 && a.slots[t] >= 0 && a.slots[t] < slots, "attend: a position or slot is out of range");
      context = a.positions[t] + int64_t(1) > context ? a.positions[t] + int64_t(1) : context;
    }
    const int64_t blocks = (context + block_size - 1) / block_size;
    check(blocks <= a.max_blocks, "attend: a position lies beyond the block table");
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t block = a.block_tables[s * a.max_blocks + b];
      check(block >= 0 && block < a.layout->num_blocks, "attend: a block table names a block that does not exist");
    }
  }
}

// What is written to must be the caller's own array, never a converted copy.
void bind_rest(nb::module_& m, nb::class_<Native>& native) {
  m.def(
      "cache_bytes",
      [](int type, int64_t num_blocks, int64_t block_size, int layers, int kv_heads, int head_dim) {
        return num_blocks * cache_layout(type, num_blocks, block_size, layers, kv_heads, head_dim).block_bytes;
      },
      nb::arg("type"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"),
      "Bytes of the buffer of a cache.");

  nb::class_<Cache>(m, "Cache", "The paged key/value cache of all layers, over a 64-byte aligned uint8 buffer of cache_bytes().")
      .def(
          "__init__",
          [](Cache* self, int type, int64_t num_blocks, int64_t block_size, int layers, int kv_heads, int head_dim,
             const Array<uint8_t, 1>& buffer) {
            const CacheLayout layout = cache_layout(type, num_blocks, block_size, layers, kv_heads, head_dim);
            check(int64_t(buffer.size()) == num_blocks * layout.block_bytes, "Cache: the buffer is not of cache_bytes");
            check(reinterpret_cast<uintptr_t>(buffer.data()) % 64 == 0, "Cache: the buffer is not aligned to 64 bytes");
            new (self) Cache{layout, buffer};
          },
          nb::arg("type"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"),
          nb::arg("buffer").noconvert());

  native
      .def("decode_rows", &decode_rows, nb::arg("type"), nb::arg("source"), nb::arg("index").none(), nb::arg("out").noconvert())
      .def("encode_rows", &encode_rows, nb::arg("type"), nb::arg("x"), nb::arg("importance").none(), nb::arg("out").noconvert())
      .def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out").noconvert())
      .def("rope_angles", &rope_angles, nb::arg("positions"), nb::arg("inverse_frequencies"), nb::arg("scale"),
           nb::arg("cosines").noconvert(), nb::arg("sines").noconvert())
      .def("rope", &rope, nb::arg("x").noconvert(), nb::arg("cosines"), nb::arg("sines"))
      .def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), nb::arg("out").noconvert())
      .def("attend", &attend, nb::arg("cache"), nb::arg("layer"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
           nb::arg("out").noconvert(), nb::arg("positions"), nb::arg("slots"), nb::arg("seq_starts"), nb::arg("block_tables"))
      .def("sample", &sample, nb::arg("logits"), nb::arg("rows"))
      .def("read_memory", &read_memory, nb::arg("data").noconvert())
      .def("multiply_int8", &multiply_int8, nb::arg("rounds"), "Returns the operations done; see csrc/limits.cpp.")
      .def("multiply_float32", &multiply_float32, nb::arg("rounds"), "Returns the operations done; see csrc/limits.cpp.");
}

}  // namespace puna
