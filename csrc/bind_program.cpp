// Python's view of programs: a method for each op, which checks its operands once, and `Native.run`.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "program.hpp"

namespace puna {
namespace {

using FloatVector = Array<const float, 1>;
using Ints = Array<const int32_t, 1>;

constexpr size_t kMostWeights = 8;  // of one linears: three for q, k, v

bool same_shape(const ProgramBuffer& a, const ProgramBuffer& b) { return a.columns == b.columns && a.of_logit_rows == b.of_logit_rows; }

void embed(Program& program, int type, const Array<const uint8_t, 2>& source, int out) {
  const BlockShape shape = block_shape(type);
  const int64_t columns = program.buffer(out).columns;
  check(shape.numbers > 0 && columns % shape.numbers == 0 && int64_t(source.shape(1)) == columns / shape.numbers * shape.bytes,
        "embed: the source's rows don't hold as many numbers as the output's");
  check(!program.buffer(out).of_logit_rows, "embed: the output has a row for each token");
  const int64_t vocabulary = int64_t(source.shape(0));
  program.add_check([=](const StepArgs& args) {
    for (int64_t t = 0; t < args.tokens; t++)
      check(args.token_ids[t] >= 0 && args.token_ids[t] < vocabulary, "run: a token id is out of range");
  });
  program.add([=](const ProgramRun& run) {
    run.native.kernels->decode_rows(run.native.pool, type, columns, source.data(), run.args.token_ids, run.args.tokens, run.at(out));
  });
}

void rms_norm(Program& program, int x, const FloatVector& weight, float eps, int out) {
  check(same_shape(program.buffer(x), program.buffer(out)) && int64_t(weight.shape(0)) == program.buffer(x).columns,
        "rms_norm: shapes don't agree");
  program.add([=](const ProgramRun& run) {
    run.native.kernels->rms_norm(run.native.pool, run.at(x), weight.data(), eps, run.rows(x), run.columns(x), run.at(out));
  });
}

void linears(Program& program, int x, const std::vector<const Panels*>& weights, const std::vector<std::optional<FloatVector>>& biases,
             int residual, const std::vector<int>& outs, const std::vector<const Changes*>& changes) {
  const ProgramBuffer& input = program.buffer(x);
  check(biases.size() == weights.size() && outs.size() == weights.size() && changes.size() == weights.size(),
        "linears: as many biases, outputs and changes as weights are needed");
  check(weights.size() <= kMostWeights, "linears: too many weights at once");
  std::vector<Panels> panels;
  for (size_t i = 0; i < weights.size(); i++) {
    const ProgramBuffer& out = program.buffer(outs[i]);
    check(weights[i]->columns == input.columns && weights[i]->rows == out.columns && out.of_logit_rows == input.of_logit_rows &&
              outs[i] != x,
          "linears: shapes don't agree");
    check(!biases[i] || int64_t(biases[i]->shape(0)) == out.columns, "linears: a bias is not of length rows");
    check(residual < 0 || same_shape(program.buffer(residual), out), "linears: the residual is not of the output's shape");
    panels.push_back(*weights[i]);
  }
  std::vector<Changes> changed(weights.size());
  bool any = false;
  for (size_t i = 0; i < weights.size(); i++) {
    if (!changes[i]) continue;
    check(!input.of_logit_rows, "linears: only an input with a row for each token can be changed by adapters");
    check(changes[i]->rows == weights[i]->rows && changes[i]->columns == input.columns, "linears: the changes are of another shape");
    changed[i] = *changes[i];
    any = true;
  }
  program.add([=](const ProgramRun& run) {
    LinearTarget targets[kMostWeights];
    for (size_t i = 0; i < panels.size(); i++)
      targets[i] = {panels[i].type, panels[i].rows, panels[i].buffer.data(), biases[i] ? biases[i]->data() : nullptr,
                    residual < 0 ? nullptr : run.at(residual), run.at(outs[i])};
    run.native.kernels->linears(run.native.pool, run.at(x), run.rows(x), run.columns(x), targets, int(panels.size()));
  });
  if (!any) return;
  program.add_check([=](const StepArgs& args) {
    for (const Changes& change : changed) check_adapters(args.adapters, change);
  });
  program.add([=](const ProgramRun& run) {
    if (run.args.adapters.groups().empty()) return;
    LowRankTarget targets[kMostWeights];
    for (size_t i = 0; i < changed.size(); i++) targets[i] = {run.columns(outs[i]), changed[i].data(), run.at(outs[i])};
    add_low_rank(run.native, run.at(x), run.columns(x), run.args.adapters, targets, int(changed.size()));
  });
}

void rope_angles(Program& program, const FloatVector& inverse_frequencies, float scale, int cosines, int sines) {
  check(same_shape(program.buffer(cosines), program.buffer(sines)) && !program.buffer(cosines).of_logit_rows && cosines != sines &&
            int64_t(inverse_frequencies.shape(0)) == program.buffer(cosines).columns,
        "rope_angles: shapes don't agree");
  program.add([=](const ProgramRun& run) {
    run.native.kernels->rope_angles(run.native.pool, run.args.positions, inverse_frequencies.data(), 0, scale, run.args.tokens,
                                    run.columns(cosines), run.at(cosines), run.at(sines));
  });
}

void rope(Program& program, int x, int cosines, int sines) {
  const ProgramBuffer &angles = program.buffer(cosines), &input = program.buffer(x);
  check(!input.of_logit_rows && same_shape(angles, program.buffer(sines)) && !angles.of_logit_rows &&
            input.columns % (2 * angles.columns) == 0,
        "rope: the angles are not of half a head");
  const int head_dim = int(2 * angles.columns), heads = int(input.columns / head_dim);
  program.add([=](const ProgramRun& run) {
    run.native.kernels->rope(run.native.pool, run.at(x), run.at(cosines), run.at(sines), run.args.tokens, heads, head_dim);
  });
}

void attend(Program& program, int layer, int q, int k, int v, int out) {
  check(same_shape(program.buffer(q), program.buffer(out)) && same_shape(program.buffer(k), program.buffer(v)) &&
            !program.buffer(q).of_logit_rows && !program.buffer(k).of_logit_rows,
        "attend: shapes don't agree");
  const int64_t q_columns = program.buffer(q).columns, kv_columns = program.buffer(k).columns;
  program.add_check([=](const StepArgs& args) {
    const CacheLayout& layout = args.cache.layout;
    check(layer >= 0 && layer < layout.layers && kv_columns == int64_t(layout.kv_heads) * layout.head_dim && q_columns % kv_columns == 0,
          "run: the cache is not of the program's shape");
  });
  program.add([=](const ProgramRun& run) {
    const StepArgs& args = run.args;
    run.native.kernels->attend(run.native.pool, AttendArgs{
                                                    .q = run.at(q),
                                                    .k = run.at(k),
                                                    .v = run.at(v),
                                                    .out = run.at(out),
                                                    .layout = &args.cache.layout,
                                                    .layer = args.cache.layer(layer),
                                                    .heads = int(run.columns(q) / args.cache.layout.head_dim),
                                                    .positions = args.positions,
                                                    .slots = args.slots,
                                                    .seq_starts = args.seq_starts,
                                                    .block_tables = args.block_tables,
                                                    .tokens = args.tokens,
                                                    .sequences = args.sequences,
                                                    .max_blocks = args.max_blocks,
                                                });
  });
}

void swiglu(Program& program, int gate, int up, int out) {
  check(same_shape(program.buffer(gate), program.buffer(up)) && same_shape(program.buffer(gate), program.buffer(out)),
        "swiglu: shapes don't agree");
  program.add([=](const ProgramRun& run) {
    run.native.kernels->swiglu(run.native.pool, run.at(gate), run.at(up), run.rows(gate), run.columns(gate), run.at(out));
  });
}

void rows(Program& program, int x, int out) {
  check(program.buffer(x).columns == program.buffer(out).columns && !program.buffer(x).of_logit_rows && program.buffer(out).of_logit_rows,
        "rows: shapes don't agree");
  program.add([=](const ProgramRun& run) {
    const size_t bytes = size_t(run.columns(x)) * sizeof(float);
    for (int64_t r = 0; r < run.args.logit_rows; r++)
      std::memcpy(run.at(out) + r * run.columns(x), run.at(x) + run.args.logit_row_index[r] * run.columns(x), bytes);
  });
}

// token_ids, positions, slots int32[T]; seq_starts int32[S + 1]; block_tables int32[S, max blocks]; logit_rows int32[R];
// adapters int32[S] or none -> result
void run(Native& native, Program& program, const Cache& cache, const Ints& token_ids, const Ints& positions, const Ints& slots,
         const Ints& seq_starts, const Array<const int32_t, 2>& block_tables, const Ints& logit_rows,
         const std::optional<Ints>& adapters, const Array<float, 2>& result) {
  const size_t tokens = token_ids.shape(0);
  check(positions.shape(0) == tokens && slots.shape(0) == tokens && seq_starts.shape(0) == block_tables.shape(0) + 1,
        "run: shapes of the batch don't agree");
  const AdapterGroups groups = group_adapters(adapters, seq_starts, int64_t(tokens));
  const StepArgs args{
      .cache = cache,
      .tokens = int64_t(tokens),
      .logit_rows = int64_t(logit_rows.shape(0)),
      .sequences = int64_t(block_tables.shape(0)),
      .max_blocks = int64_t(block_tables.shape(1)),
      .token_ids = token_ids.data(),
      .positions = positions.data(),
      .slots = slots.data(),
      .seq_starts = seq_starts.data(),
      .block_tables = block_tables.data(),
      .logit_row_index = logit_rows.data(),
      .adapters = groups,
  };
  const ProgramBuffer& out = program.buffer(program.result());
  check(int64_t(result.shape(0)) == (out.of_logit_rows ? args.logit_rows : args.tokens) && int64_t(result.shape(1)) == out.columns,
        "run: the result is not of the program's shape");
  float* to = result.data();
  nb::gil_scoped_release release;
  for (int64_t r = 0; r < args.logit_rows; r++)
    check(args.logit_row_index[r] >= 0 && args.logit_row_index[r] < args.tokens, "run: a row is out of range");
  program.check_args(args);
  AttendArgs batch{};
  batch.layout = &cache.layout;
  batch.positions = args.positions;
  batch.slots = args.slots;
  batch.seq_starts = args.seq_starts;
  batch.block_tables = args.block_tables;
  batch.tokens = args.tokens;
  batch.sequences = args.sequences;
  batch.max_blocks = args.max_blocks;
  check_batch(batch);
  program.run(native, args, to);
}

}  // namespace

void bind_program(nb::module_& m, nb::class_<Native>& native) {
  nb::class_<Program>(m, "Program", "A list of op calls over numbered buffers; see puna.ops.native_program.")
      .def(
          "__init__",
          [](Program* self, const std::vector<std::pair<int64_t, bool>>& buffers, int result) {
            std::vector<ProgramBuffer> made;
            for (const auto& [columns, of_logit_rows] : buffers) {
              check(columns > 0, "Program: a buffer has no columns");
              made.push_back({columns, of_logit_rows});
            }
            check(result >= 0 && size_t(result) < made.size(), "Program: no such buffer");
            new (self) Program(std::move(made), result);
          },
          nb::arg("buffers"), nb::arg("result"))
      .def_prop_ro("num_buffers", &Program::num_buffers)
      .def("embed", &embed, nb::arg("type"), nb::arg("source"), nb::arg("out"))
      .def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"))
      .def("linears", &linears, nb::arg("x"), nb::arg("weights"), nb::arg("biases"), nb::arg("residual"), nb::arg("outs"),
           nb::arg("changes"))
      .def("rope_angles", &rope_angles, nb::arg("inverse_frequencies"), nb::arg("scale"), nb::arg("cosines"), nb::arg("sines"))
      .def("rope", &rope, nb::arg("x"), nb::arg("cosines"), nb::arg("sines"))
      .def("attend", &attend, nb::arg("layer"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"))
      .def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), nb::arg("out"))
      .def("rows", &rows, nb::arg("x"), nb::arg("out"));
  native.def("run", &run, nb::arg("program"), nb::arg("cache"), nb::arg("token_ids"), nb::arg("positions"), nb::arg("slots"),
             nb::arg("seq_starts"), nb::arg("block_tables"), nb::arg("logit_rows"),
             nb::arg("adapters").none(), nb::arg("result").noconvert());
}

}  // namespace puna
