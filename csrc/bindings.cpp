// Python's view of the native core, and the linear layers. Everything else is bound in bind_rest.cpp.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "panel.hpp"
#include "program.hpp"

namespace puna {
namespace {

using Matrix = Array<float, 2>;
using ConstMatrix = Array<const float, 2>;
using ConstVector = Array<const float, 1>;

void linears(Native& native, const ConstMatrix& x, const std::vector<const Panels*>& weights,
             const std::vector<std::optional<ConstVector>>& biases, const std::optional<ConstMatrix>& residual,
             const std::vector<Matrix>& outs) {
  const size_t tokens = x.shape(0), count = weights.size();
  check(biases.size() == count && outs.size() == count, "linears: as many biases and outputs as weights are needed");
  std::vector<LinearTarget> targets(count);
  for (size_t i = 0; i < count; i++) {
    const Panels& w = *weights[i];
    const size_t rows = size_t(w.rows);
    check(int64_t(x.shape(1)) == w.columns, "linears: the input's width differs from the weight's columns");
    check(outs[i].shape(0) == tokens && outs[i].shape(1) == rows, "linears: an output is not of shape [tokens, rows]");
    check(!biases[i] || biases[i]->shape(0) == rows, "linears: a bias is not of length rows");
    check(!residual || (residual->shape(0) == tokens && residual->shape(1) == rows), "linears: the residual is not of shape [tokens, rows]");
    targets[i] = {w.type, w.rows, w.buffer.data(), biases[i] ? biases[i]->data() : nullptr, residual ? residual->data() : nullptr,
                  outs[i].data()};
  }
  const float* input = x.data();
  const int64_t columns = int64_t(x.shape(1));
  nb::gil_scoped_release release;
  native.kernels->linears(native.pool, input, int64_t(tokens), columns, targets.data(), int(count));
}

void pack(Native& native, int type, int64_t rows, int64_t columns, const Array<const uint8_t, 2>& source,
          const Array<uint8_t, 1>& packed) {
  const int64_t bytes = packed_bytes(type, rows, columns);
  const BlockShape shape = block_shape(type);
  check(rows > 0 && columns > 0 && bytes > 0, "pack: the type has no packed form for this shape");
  check(int64_t(source.shape(0)) == rows && int64_t(source.shape(1)) == columns / shape.numbers * shape.bytes,
        "pack: the source is not of shape [rows, row bytes]");
  check(int64_t(packed.size()) == bytes, "pack: the destination is not of packed_bytes");
  const uint8_t* from = source.data();
  uint8_t* to = packed.data();
  nb::gil_scoped_release release;
  native.kernels->pack(native.pool, type, rows, columns, from, to);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Puna's native core: see puna.ops.native_ops.";
  nb::set_leak_warnings(false);  // models may outlive the module at interpreter exit

  m.attr("panel_layout") = kPanelLayout;
  m.def("packed_bytes", &packed_bytes, nb::arg("type"), nb::arg("rows"), nb::arg("columns"),
        "Bytes of the packed form of a matrix; 0 when the type has none for this shape.");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const char* name : kInstructionSets)
          if (find_kernels(name)) names.emplace_back(name);
        return names;
      },
      "The kernel sets that this machine can run, best first.");

  nb::class_<Panels>(m, "Panels", "A packed matrix: 64-byte aligned uint8 panels that pack() wrote.")
      .def(
          "__init__",
          [](Panels* self, int type, int64_t rows, int64_t columns, const Array<const uint8_t, 1>& buffer) {
            check(rows > 0 && columns > 0 && packed_bytes(type, rows, columns) > 0, "Panels: the type has no packed form for this shape");
            check(int64_t(buffer.size()) == packed_bytes(type, rows, columns), "Panels: the buffer is not of packed_bytes");
            check(reinterpret_cast<uintptr_t>(buffer.data()) % 64 == 0, "Panels: the buffer is not aligned to 64 bytes");
            new (self) Panels{buffer, type, rows, columns};
          },
          nb::arg("type"), nb::arg("rows"), nb::arg("columns"), nb::arg("buffer").noconvert());

  nb::class_<Native> native(m, "Native", "A thread pool and the kernels it drives. Methods release the GIL; calls from several threads take turns.");
  native
      .def(
          "__init__",
          [](Native* self, int threads, const char* isa, uintptr_t team) {
            const Kernels* kernels = find_kernels(isa);
            check(kernels, "this machine cannot run the kernels asked for");
            check(threads >= 1 && threads <= 1024, "threads must be from 1 to 1024");
            new (self) Native{ThreadPool(threads, reinterpret_cast<ThreadPool::Team>(team)), kernels};
          },
          nb::arg("threads"), nb::arg("isa"), nb::arg("team") = 0,
          "team: the address of GOMP_parallel in an OpenMP runtime whose threads are to be used; 0: its own.")
      .def_prop_ro("isa", [](const Native& self) { return self.kernels->name; })
      .def_prop_ro("threads", [](const Native& self) { return self.pool.threads(); })
      .def("pack", &pack, nb::arg("type"), nb::arg("rows"), nb::arg("columns"), nb::arg("source"), nb::arg("packed").noconvert())
      .def("linears", &linears, nb::arg("x"), nb::arg("weights"), nb::arg("biases"), nb::arg("residual").none(),
           nb::arg("outs").noconvert());
  bind_rest(m, native);
  bind_training(native);
  bind_adapters(m, native);
  bind_program(m, native);
  bind_bpe(m);
}

}  // namespace puna
