// LoRA adapters, as the bindings hold them: what all of them change in one matrix, and which tokens of a step use which.
#pragma once

#include <optional>
#include <vector>

#include "bind.hpp"

namespace puna {

// The changes of one matrix, by the adapters' numbers. Keeps their buffers alive.
struct Changes {
  int64_t rows = 0, columns = 0;
  std::vector<Array<const float, 2>> buffers;
  std::vector<LowRank> adapters;

  // As LowRankTarget takes them.
  const LowRank* data() const { return adapters.empty() ? nullptr : adapters.data(); }
};

// The tokens of a step that use an adapter, each adapter's together.
class AdapterGroups {
 public:
  AdapterGroups() = default;
  // The adapters of sequences, -1 for none.
  AdapterGroups(const int32_t* adapters, const int32_t* seq_starts, int64_t sequences);
  AdapterGroups(AdapterGroups&&) = default;

  const std::vector<AdapterTokens>& groups() const { return groups_; }
  int32_t highest() const { return groups_.empty() ? -1 : groups_.back().adapter; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<AdapterTokens> groups_;  // ascending, with pointers into tokens_
};

// Of a step's arrays; throws std::invalid_argument. No array of adapters: no groups.
AdapterGroups group_adapters(const std::optional<Array<const int32_t, 1>>& adapters, const Array<const int32_t, 1>& seq_starts,
                             int64_t tokens);
// Throws std::invalid_argument where a group's adapter has no entry in the changes (of a matrix that has some).
void check_adapters(const AdapterGroups& groups, const Changes& changes);
void add_low_rank(Native& native, const float* x, int64_t columns, const AdapterGroups& groups, const LowRankTarget* targets, int count);

void bind_adapters(nb::module_& m, nb::class_<Native>& native);

}  // namespace puna
