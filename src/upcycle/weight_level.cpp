// N experts, e one of them; G shards of a copy; fe expert width, h hidden
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iomanip>

#include "base/error.hpp"
#include "upcycle/certificate.hpp"
#include "upcycle/units.hpp"

namespace upcycle {

namespace {

/// Values as integers: equal bits, no tolerance, and NaN equals itself.
Tensor bits(const Tensor& x) { return x.contiguous().view(x.element_size() == 2 ? at::kShort : at::kInt); }

/// Compares `value` (part of `spec` from `begin` on) with `expected`. Returns how many differ; tells of the first.
int64_t compare(const std::string& name, const Shape& begin, const Tensor& value, const Tensor& expected, std::string& first) {
  // Nearly always all are equal, and that shows much faster.
  const Tensor a = value.contiguous(), b = expected.contiguous();
  if (std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0) return 0;
  const Tensor differs = bits(a).ne(bits(b));
  const int64_t count = differs.sum().item<int64_t>();
  if (count == 0 || !first.empty()) return count;
  const Tensor place = differs.nonzero().select(0, 0);
  Tensor found = value, wanted = expected;
  std::string where;
  for (int64_t d = 0; d < value.dim(); ++d) {
    const int64_t at = place[d].item<int64_t>();
    found = found.select(0, at), wanted = wanted.select(0, at);
    where += text(d ? ", " : "", begin[static_cast<size_t>(d)] + at);
  }
  first = text(name, "[", where, "] is ", std::setprecision(9), found.item<double>(), ", the recipe says ", wanted.item<double>());
  return count;
}

struct ExpertSlice {
  std::string dense;
  int64_t unit_dim;   ///< of [rows, columns], the dim of the hidden units
  double factor;
};

ExpertSlice slice_of(const ParameterSpec& spec, const Recipe& recipe) {
  const size_t dot = spec.name.rfind(".experts.");
  if (dot == std::string::npos) throw std::logic_error(spec.name + " is no matrix of experts");
  const std::string matrix = spec.name.substr(dot + 9);   // "up_proj.weight"
  const std::string dense = spec.name.substr(0, dot) + "." + matrix;
  if (matrix.starts_with("gate")) return {dense, 0, recipe.gate_factor};
  if (matrix.starts_with("up")) return {dense, 0, recipe.up_factor};
  return {dense, 1, recipe.down_factor};
}

/// The mean of all sources, added up here.
Tensor mean_of_sources(const ReadDense& read, const std::string& name, const Box& box) {
  if (read.sources() == 1) return read(name, box);
  Tensor sum = read.of(0)(name, box).to(at::kDouble);
  for (int64_t i = 1; i < read.sources(); ++i) sum = sum + read.of(i)(name, box).to(at::kDouble);
  return sum.div(static_cast<double>(read.sources())).to(at::kFloat);
}

/// What keeps `order` from being each of 0 .. f-1 once; "" when it is.
std::string fault_of_order(const std::vector<int64_t>& order, int64_t f) {
  std::vector<int64_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < f; ++i) {
    if (i >= static_cast<int64_t>(sorted.size()) || sorted[static_cast<size_t>(i)] != i) return text("takes unit ", i, " not once");
  }
  return static_cast<int64_t>(sorted.size()) == f ? "" : text("takes ", sorted.size(), " units of ", f);
}

/// Rows or columns of a dense matrix one by one, `other` from `begin` on along the other dim: nothing of how grow() reads.
Tensor dense_units(const ReadDense& read, const ExpertSlice& slice, const int64_t* units, int64_t count, int64_t f, int64_t begin, int64_t other) {
  std::vector<Tensor> parts;
  if (slice.unit_dim == 0) {
    for (int64_t i = 0; i < count; ++i) parts.push_back(read(slice.dense, {{units[i], begin}, {1, other}}));
    return at::cat(parts, 0);
  }
  constexpr int64_t kRows = 128;
  const Tensor columns = at::tensor(at::IntArrayRef(units, static_cast<size_t>(count)), at::kLong);
  for (int64_t row = 0; row < other; row += kRows) {
    const Box rows{{begin + row, 0}, {std::min(kRows, other - row), f}};
    parts.push_back(read(slice.dense, rows).index_select(1, columns));
  }
  return at::cat(parts, 0);
}

void check_experts(WeightLevel& level, const ParameterSpec& spec, const Box& box, const Tensor& value, const Recipe& recipe, const ReadDense& sources) {
  const ExpertSlice slice = slice_of(spec, recipe);
  const int64_t fe = spec.shape[static_cast<size_t>(1 + slice.unit_dim)], other = box.size[static_cast<size_t>(2 - slice.unit_dim)];
  const auto redrawn = static_cast<int64_t>(std::floor(recipe.drop * static_cast<double>(fe) + 1e-9)) * other;
  const int64_t G = recipe.granularity, f = recipe.source.ffn;
  std::vector<int64_t> order;   // of the copy that is looked at
  std::string fault;            // of that order
  for (int64_t i = 0; i < box.size[0]; ++i) {
    const int64_t e = box.begin[0] + i;
    const int64_t begin = e % G * fe + box.begin[static_cast<size_t>(1 + slice.unit_dim)];
    Box wanted{{box.begin[1], box.begin[2]}, {box.size[1], box.size[2]}};
    wanted.begin[static_cast<size_t>(slice.unit_dim)] = begin;
    const ReadDense read = sources.of(recipe.of_mixture() ? 0 : recipe.source_of(e / G));
    Tensor dense;
    if (recipe.of_mixture()) {
      dense = read(spec.name, {{e / recipe.copies, box.begin[1], box.begin[2]}, {1, box.size[1], box.size[2]}}).reshape({box.size[1], box.size[2]});
    } else if (recipe.permutation == UnitOrder::identity) {
      dense = read(slice.dense, wanted);
    } else {
      if (order.empty() || (e % G == 0 && !copies_share_order(recipe))) {
        order = unit_order(recipe, spec.layer, e / G);
        fault = fault_of_order(order, f);
      }
      if (!fault.empty()) {
        level.mismatches += elements(wanted);
        if (level.first_mismatch.empty()) level.first_mismatch = text(spec.name, ": the order of copy ", e / G, "'s hidden units ", fault);
        continue;
      }
      dense = dense_units(read, slice, order.data() + begin, wanted.size[static_cast<size_t>(slice.unit_dim)], f,
                          box.begin[static_cast<size_t>(2 - slice.unit_dim)], other);
    }
    const Tensor expected = (slice.factor == 1.0 ? dense : dense.to(at::kFloat).mul(slice.factor)).to(value.scalar_type());
    std::string first;
    const int64_t differ = compare(spec.name, {e, box.begin[1], box.begin[2]}, value.select(0, i).unsqueeze(0), expected.unsqueeze(0), first);
    const int64_t allowed = recipe.noise > 0 ? elements(wanted) : redrawn;
    level.altered += std::min(differ, allowed);
    level.mismatches += std::max<int64_t>(0, differ - allowed);
    if (differ > allowed && level.first_mismatch.empty()) level.first_mismatch = first;
  }
}

void check_router(WeightLevel& level, const ParameterSpec& spec, const Box& box, const Tensor& value, const Recipe& recipe) {
  const int64_t G = recipe.granularity;
  std::vector<int64_t> heads;   // the first row, in the box, of each copy
  const auto object = [&](const std::string& what) {
    ++level.mismatches;
    if (level.first_mismatch.empty()) level.first_mismatch = spec.name + ": " + what;
  };
  if (!value.isfinite().all().item<bool>()) object("a router row is not finite");
  for (int64_t i = 0; i < box.size[0]; ++i) {
    const int64_t e = box.begin[0] + i;
    if (heads.empty() || (box.begin[0] + heads.back()) / G != e / G) {
      heads.push_back(i);
      continue;
    }
    level.mismatches += compare(spec.name, {e, box.begin[1]}, value.narrow(0, i, 1), value.narrow(0, heads.back(), 1), level.first_mismatch);
  }
  if (recipe.router_logit_std == 0) return;
  for (size_t a = 0; a < heads.size(); ++a) {
    for (size_t b = 0; b < a; ++b) {
      if (value.select(0, heads[a]).equal(value.select(0, heads[b]))) {
        object(text("copies ", (box.begin[0] + heads[b]) / G, " and ", (box.begin[0] + heads[a]) / G, " have the same router row: they would tie on every token"));
      }
    }
  }
}

}  // namespace

void WeightLevel::check(const ParameterSpec& spec, const Box& box, const Tensor& value, const Recipe& recipe, const ReadDense& read) {
  if (!inside(box, spec.shape) || value.sizes() != at::IntArrayRef(box.size)) {
    throw std::logic_error(text(spec.name, ": ", describe(box), " of ", describe(spec.shape), ", values ", describe(value.sizes().vec())));
  }
  comparisons += value.numel();
  covered[spec.name].push_back(box);
  if (value.numel() == 0) return;
  if (spec.role == Role::expert) return check_experts(*this, spec, box, value, recipe, read);
  if (spec.role == Role::router && recipe.of_mixture()) {
    // Row e of the source, as often as there are copies: from e * C on.
    const Tensor rows = read(spec.name, {{0, box.begin[1]}, {recipe.source.experts, box.size[1]}});
    const Tensor expected = rows.repeat_interleave(recipe.copies, 0).narrow(0, box.begin[0], box.size[0]);
    mismatches += compare(spec.name, box.begin, value, expected.to(value.scalar_type()), first_mismatch);
    return;
  }
  if (spec.role == Role::router) return check_router(*this, spec, box, value, recipe);
  mismatches += compare(spec.name, box.begin, value, mean_of_sources(read, spec.name, box).to(value.scalar_type()), first_mismatch);
}

void WeightLevel::merge(const WeightLevel& other) {
  comparisons += other.comparisons;
  mismatches += other.mismatches;
  altered += other.altered;
  if (first_mismatch.empty()) first_mismatch = other.first_mismatch;
  for (const auto& [name, boxes] : other.covered) {
    std::vector<Box>& mine = covered[name];
    for (const Box& box : boxes) {
      if (std::find(mine.begin(), mine.end(), box) == mine.end()) mine.push_back(box);
    }
  }
}

}  // namespace upcycle
