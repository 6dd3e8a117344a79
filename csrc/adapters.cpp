#include "adapters.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace puna {

AdapterGroups::AdapterGroups(const int32_t* adapters, const int32_t* seq_starts, int64_t sequences) {
  std::vector<std::pair<int32_t, int64_t>> order;  // adapter, sequence
  for (int64_t s = 0; s < sequences; s++)
    if (adapters[s] >= 0 && seq_starts[s] < seq_starts[s + 1]) order.emplace_back(adapters[s], s);
  std::sort(order.begin(), order.end());
  std::vector<std::pair<int32_t, size_t>> starts;  // adapter, its first place in tokens_
  for (const auto& [adapter, s] : order) {
    if (starts.empty() || starts.back().first != adapter) starts.emplace_back(adapter, tokens_.size());
    for (int32_t t = seq_starts[s]; t < seq_starts[s + 1]; t++) tokens_.push_back(t);
  }
  for (size_t i = 0; i < starts.size(); i++) {
    const size_t end = i + 1 < starts.size() ? starts[i + 1].second : tokens_.size();
    groups_.push_back({starts[i].first, tokens_.data() + starts[i].second, int64_t(end - starts[i].second)});
  }
}

AdapterGroups group_adapters(const std::optional<Array<const int32_t, 1>>& adapters, const Array<const int32_t, 1>& seq_starts,
                             int64_t tokens) {
  if (!adapters) return {};
  const int64_t sequences = int64_t(adapters->shape(0));
  const int32_t* starts = seq_starts.data();
  check(int64_t(seq_starts.shape(0)) == sequences + 1, "adapters: as many as sequences are needed");
  check(starts[0] == 0 && starts[sequences] == tokens, "adapters: seq_starts don't cover the tokens");
  for (int64_t s = 0; s < sequences; s++) check(starts[s] <= starts[s + 1], "adapters: seq_starts must not fall");
  return AdapterGroups(adapters->data(), starts, sequences);
}

void check_adapters(const AdapterGroups& groups, const Changes& changes) {
  check(changes.adapters.empty() || groups.highest() < int64_t(changes.adapters.size()), "adapters: there is no adapter of that number");
}

void add_low_rank(Native& native, const float* x, int64_t columns, const AdapterGroups& groups, const LowRankTarget* targets, int count) {
  native.kernels->add_low_rank(native.pool, x, columns, groups.groups().data(), int64_t(groups.groups().size()), targets, count);
}

namespace {

using Matrix = Array<const float, 2>;
// A [rank, columns], B^T [rank, rows], scale
using Change = std::tuple<Matrix, Matrix, double>;

void make_changes(Changes* self, int64_t rows, int64_t columns, const std::vector<std::optional<Change>>& adapters) {
  Changes made{rows, columns, {}, {}};
  for (const auto& adapter : adapters) {
    if (!adapter) {
      made.adapters.push_back({nullptr, nullptr, 0, 0});
      continue;
    }
    const auto& [down, up, scale] = *adapter;
    check(down.shape(0) > 0 && down.shape(0) == up.shape(0), "Changes: the ranks differ");
    check(int64_t(down.shape(1)) == columns && int64_t(up.shape(1)) == rows, "Changes: a change is of another shape than the matrix");
    made.buffers.push_back(down);
    made.buffers.push_back(up);
    made.adapters.push_back({down.data(), up.data(), int64_t(down.shape(0)), float(scale)});
  }
  new (self) Changes(std::move(made));
}

void add(Native& native, const Matrix& x, const Array<const int32_t, 1>& adapters, const Array<const int32_t, 1>& seq_starts,
         const std::vector<const Changes*>& changes, const std::vector<Array<float, 2>>& outs) {
  check(changes.size() == outs.size(), "add_low_rank: as many outputs as changes are needed");
  const size_t tokens = x.shape(0);
  const AdapterGroups groups = group_adapters(adapters, seq_starts, int64_t(tokens));
  std::vector<LowRankTarget> targets;
  for (size_t i = 0; i < outs.size(); i++) {
    if (!changes[i]) continue;
    check(changes[i]->columns == int64_t(x.shape(1)) && changes[i]->rows == int64_t(outs[i].shape(1)) && outs[i].shape(0) == tokens,
          "add_low_rank: shapes don't agree");
    check_adapters(groups, *changes[i]);
    targets.push_back({changes[i]->rows, changes[i]->data(), outs[i].data()});
  }
  const float* input = x.data();
  const int64_t columns = int64_t(x.shape(1));
  nb::gil_scoped_release release;
  add_low_rank(native, input, columns, groups, targets.data(), int(targets.size()));
}

}  // namespace

void bind_adapters(nb::module_& m, nb::class_<Native>& native) {
  nb::class_<Changes>(m, "Changes", "What adapters change in one matrix: for each (A, transposed B, scale), or None.")
      .def("__init__", &make_changes, nb::arg("rows"), nb::arg("columns"), nb::arg("adapters").noconvert());
  native.def("add_low_rank", &add, nb::arg("x"), nb::arg("adapters"), nb::arg("seq_starts"), nb::arg("changes"),
             nb::arg("outs").noconvert());
}

}  // namespace puna
