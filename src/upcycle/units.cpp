// f hidden units of a dense feed-forward, G shards of a copy
#include "upcycle/units.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "base/error.hpp"

namespace upcycle {

namespace {

constexpr int64_t kBlockBytes = 64 << 20;

/// Runs of neighbours: units[begin .. end) are units[begin], units[begin] + 1, ...
template <class Action>
void each_run(const std::vector<int64_t>& units, Action action) {
  for (size_t begin = 0, end = 0; begin < units.size(); begin = end) {
    for (end = begin + 1; end < units.size() && units[end] == units[end - 1] + 1; ++end) {
    }
    action(static_cast<int64_t>(begin), static_cast<int64_t>(end - begin));
  }
}

bool one_run(const std::vector<int64_t>& units) {
  for (size_t i = 1; i < units.size(); ++i) {
    if (units[i] != units[i - 1] + 1) return false;
  }
  return true;
}

}  // namespace

std::vector<int64_t> shuffled(int64_t count, const Random& random) {
  std::vector<std::pair<uint64_t, int64_t>> keys;
  keys.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) keys.emplace_back(random.bits(static_cast<uint64_t>(i)), i);
  std::sort(keys.begin(), keys.end());
  std::vector<int64_t> out;
  out.reserve(keys.size());
  for (const auto& [key, i] : keys) out.push_back(i);
  return out;
}

std::vector<int64_t> unit_order(const Recipe& recipe, int64_t layer, int64_t copy) {
  const int64_t f = recipe.source.ffn;
  if (recipe.permutation == UnitOrder::random) return shuffled(f, Random(recipe.seed, text("layer ", layer, "/units of copy ", copy)));
  if (recipe.permutation == UnitOrder::clusters) {
    const auto found = recipe.clusters.find(layer);
    if (found == recipe.clusters.end()) throw std::logic_error(text("the clusters of layer ", layer, " are not known"));
    return found->second;
  }
  std::vector<int64_t> out(static_cast<size_t>(f));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

std::vector<int64_t> units_of_expert(const Recipe& recipe, int64_t layer, int64_t expert) {
  const int64_t G = recipe.granularity, fe = recipe.source.ffn / G;
  const std::vector<int64_t> order = unit_order(recipe, layer, expert / G);
  const auto begin = order.begin() + expert % G * fe;
  return {begin, begin + fe};
}

Tensor read_units(const ReadDense& read, const std::string& name, int64_t unit_dim, const std::vector<int64_t>& units, int64_t begin, int64_t size) {
  const auto box = [&](int64_t first, int64_t count) {
    return unit_dim == 0 ? Box{{first, begin}, {count, size}} : Box{{begin, first}, {size, count}};
  };
  const auto count = static_cast<int64_t>(units.size());
  if (one_run(units)) return read(name, box(units.empty() ? 0 : units.front(), count));
  if (unit_dim == 0) {
    Tensor out;
    each_run(units, [&](int64_t at, int64_t length) {
      const Tensor rows = read(name, box(units[static_cast<size_t>(at)], length));
      if (!out.defined()) out = at::empty({count, size}, rows.options());
      out.narrow(0, at, length).copy_(rows);
    });
    return out;
  }
  // A column is a few bytes of every row, and a disk gives pages.
  const auto [least, most] = std::minmax_element(units.begin(), units.end());
  const int64_t first = *least, width = *most - first + 1, rows = std::max<int64_t>(1, kBlockBytes / (4 * width));
  const Tensor columns = at::tensor(units, at::kLong) - first;
  Tensor out;
  for (int64_t row = 0; row < size; row += rows) {
    const int64_t some = std::min(rows, size - row);
    const Tensor block = read(name, {{begin + row, first}, {some, width}});
    if (!out.defined()) out = at::empty({size, count}, block.options());
    out.narrow(0, row, some).copy_(block.index_select(1, columns));
  }
  return out;
}

}  // namespace upcycle
