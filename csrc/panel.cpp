#include "panel.hpp"

#include <utility>

#include "kernels.hpp"

namespace puna {
namespace {

template <size_t... I>
constexpr auto make_sizes(std::index_sequence<I...>) {
  struct Sizes {
    PanelSize rows[sizeof...(I)];
  };
  return Sizes{{{kPanelFormats[I].type, block_columns(kPanelFormats[I]), block_bytes(kPanelFormats[I])}...}};
}
constexpr auto kSizes = make_sizes(std::make_index_sequence<std::size(kPanelFormats)>{});

}  // namespace

const PanelSize* find_panel_size(int type) {
  for (const PanelSize& size : kSizes.rows)
    if (size.type == type) return &size;
  return nullptr;
}

int64_t packed_bytes(int type, int64_t rows, int64_t columns) {
  const PanelSize* size = find_panel_size(type);
  if (!size || columns % size->block_columns) return 0;
  return (rows + kPanelRows - 1) / kPanelRows * (columns / size->block_columns) * size->block_bytes;
}

}  // namespace puna
