#include "upcycle/merge.hpp"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <span>

#include "upcycle/units.hpp"

namespace upcycle {

namespace {

constexpr int64_t kBlockElements = 1 << 20;

/// Hidden units that an expert has and the box wants: where they are in the expert, and where in the box.
struct Shared {
  std::vector<int64_t> here, there;
};

Shared shared(std::span<const int64_t> units, int64_t begin, int64_t size) {
  Shared out;
  for (size_t i = 0; i < units.size(); ++i) {
    if (units[i] < begin || units[i] >= begin + size) continue;
    out.here.push_back(static_cast<int64_t>(i));
    out.there.push_back(units[i] - begin);
  }
  return out;
}

}  // namespace

Tensor merged(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read) {
  if (spec.role != Role::feed_forward || !recipe.moe.is_moe_layer(spec.layer)) return read(spec.name, box);
  const size_t dot = spec.name.rfind(".mlp.") + 4;
  const std::string matrix = spec.name.substr(dot + 1), experts = spec.name.substr(0, dot) + ".experts." + matrix;
  const bool down = matrix.starts_with("down"), up = matrix.starts_with("up");
  const size_t unit_dim = down ? 1 : 0, other_dim = 1 - unit_dim;
  const double factor = down ? recipe.down_factor : up ? recipe.up_factor : recipe.gate_factor;
  // fp64 holds the sum of equal fp32 numbers exactly, so that the mean of equal copies is each of them.
  const Tensor sum = at::zeros(box.size, at::kDouble);
  std::vector<int64_t> order;
  for (int64_t e = 0; e < recipe.moe.experts; ++e) {
    if (e % recipe.granularity == 0) order = unit_order(recipe, spec.layer, e / recipe.granularity);
    const auto fe = static_cast<size_t>(recipe.moe.expert_ffn), shard = static_cast<size_t>(e % recipe.granularity);
    const Shared units = shared(std::span(order).subspan(shard * fe, fe), box.begin[unit_dim], box.size[unit_dim]);
    const auto count = static_cast<int64_t>(units.here.size());
    if (count == 0) continue;
    // From the first unit that is wanted to the last; a row of down has them all, and of it all rows are wanted.
    const int64_t first = units.here.front(), width = units.here.back() + 1 - first;
    const int64_t step = down || width == count ? width : std::max<int64_t>(1, kBlockElements / box.size[other_dim]);
    for (int64_t at = first; at < first + width; at += step) {
      const int64_t some = std::min(step, first + width - at);
      const auto begin = std::lower_bound(units.here.begin(), units.here.end(), at), end = std::lower_bound(begin, units.here.end(), at + some);
      if (begin == end) continue;
      Box part{{e, 0, 0}, {1, 0, 0}};
      part.begin[1 + unit_dim] = at, part.size[1 + unit_dim] = some;
      part.begin[1 + other_dim] = box.begin[other_dim], part.size[1 + other_dim] = box.size[other_dim];
      Tensor value = read(experts, part).select(0, 0);
      std::vector<int64_t> from(begin, end);
      for (int64_t& unit : from) unit -= at;
      const auto dim = static_cast<int64_t>(unit_dim);
      if (static_cast<int64_t>(from.size()) < some) value = value.index_select(dim, at::tensor(from, at::kLong));
      const std::vector<int64_t> to(units.there.begin() + (begin - units.here.begin()), units.there.begin() + (end - units.here.begin()));
      sum.index_add_(dim, at::tensor(to, at::kLong), value.to(at::kDouble).div_(factor));
    }
  }
  return sum.div_(static_cast<double>(recipe.copies)).to(at::kFloat);
}

}  // namespace upcycle
