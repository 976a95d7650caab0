// N experts, e one of them; C copies, c one of them; G shards, g one of them; fe expert width (hidden units of one expert), h hidden
#include "upcycle/grow.hpp"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "base/error.hpp"
#include "base/rng.hpp"
#include "upcycle/units.hpp"

namespace upcycle {

namespace {

/// value(g, x) -> the new number, for every element of `target`; g is its flat index in the global tensor, x what `target` has.
template <class Value>
void map_elements(const Shape& shape, const Box& box, const Tensor& target, Value value) {
  const int64_t dims = target.dim(), columns = dims ? box.size.back() : 1;
  const int64_t rows = columns ? elements(box) / columns : 0;
  float* const data = target.data_ptr<float>();
  Shape at(box.size.size(), 0);  // of the row
  for (int64_t row = 0; row < rows; ++row) {
    int64_t global = 0, local = 0;
    for (int64_t d = 0; d < dims; ++d) {
      global = global * shape[d] + box.begin[d] + at[d];
      local += at[d] * target.stride(d);
    }
    const int64_t step = dims ? target.stride(dims - 1) : 0;
    for (int64_t column = 0; column < columns; ++column) {
      float& x = data[local + column * step];
      x = static_cast<float>(value(static_cast<uint64_t>(global + column), x));
    }
    for (int64_t d = dims - 2; d >= 0 && ++at[d] == box.size[d]; --d) at[d] = 0;
  }
}

/// Which of the expert's three matrices.
enum class Matrix { gate, up, down };

Matrix matrix_of(const ParameterSpec& spec) {
  if (spec.name.ends_with(".gate_proj.weight")) return Matrix::gate;
  if (spec.name.ends_with(".up_proj.weight")) return Matrix::up;
  return Matrix::down;
}

double factor_of(const ParameterSpec& spec, const Recipe& recipe) {
  switch (matrix_of(spec)) {
    case Matrix::gate: return recipe.gate_factor;
    case Matrix::up: return recipe.up_factor;
    case Matrix::down: return recipe.down_factor;
  }
  throw std::logic_error("three matrices");
}

/// "model.layers.0.mlp.experts.up_proj.weight" -> "model.layers.0.mlp.up_proj.weight"
std::string dense_name(const std::string& name) {
  const std::string_view infix = ".experts";
  std::string out = name;
  return out.erase(out.rfind(infix), infix.size());
}

/// For each hidden unit of expert `e`: is it drawn anew? The floor(drop * fe) units with the smallest random numbers are.
std::vector<bool> dropped_units(const ParameterSpec& spec, int64_t e, int64_t fe, const Recipe& recipe) {
  const auto count = static_cast<int64_t>(std::floor(recipe.drop * static_cast<double>(fe) + 1e-9));  // 0.29 * 100 is 28.99...
  const std::string whose = recipe.drop_indices == DropIndices::shared ? text("layer ", spec.layer) : spec.name;
  const Random random(recipe.seed, text(whose, "/dropped units of expert ", e));
  const std::vector<int64_t> units = shuffled(fe, random);
  std::vector<bool> dropped(static_cast<size_t>(fe), false);
  for (int64_t i = 0; i < count; ++i) dropped[static_cast<size_t>(units[static_cast<size_t>(i)])] = true;
  return dropped;
}

/// Of the dense slice: root mean square of all, mean and standard deviation of the dropped units. fp64, in row-major order.
struct Statistics {
  double rms = 0, mean = 0, deviation = 0;
};

Statistics measure(const Tensor& slice, int64_t unit_dim, const std::vector<bool>& dropped) {
  const int64_t rows = slice.size(0), columns = slice.size(1);
  const float* const data = slice.const_data_ptr<float>();
  double squares = 0, sum = 0;
  int64_t count = 0;
  const auto each = [&](auto action) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) action(static_cast<double>(data[r * columns + c]), dropped[unit_dim == 0 ? r : c]);
    }
  };
  each([&](double x, bool drop) {
    squares += x * x;
    if (drop) sum += x, ++count;
  });
  Statistics out;
  out.rms = std::sqrt(squares / static_cast<double>(rows * columns));
  if (count == 0) return out;
  out.mean = sum / static_cast<double>(count);
  double spread = 0;
  each([&](double x, bool drop) {
    if (drop) spread += (x - out.mean) * (x - out.mean);
  });
  out.deviation = std::sqrt(spread / static_cast<double>(count));
  return out;
}

/// Noise and drop of the part `box` of expert `e`; `target` has the dense values of `box`.
void disturb(const ParameterSpec& spec, const Box& box, int64_t e, const Recipe& recipe, const Tensor& slice, const Tensor& target) {
  const int64_t unit_dim = matrix_of(spec) == Matrix::down ? 1 : 0, columns = spec.shape[2];
  const std::vector<bool> dropped = dropped_units(spec, e, slice.size(unit_dim), recipe);
  const Statistics dense = measure(slice, unit_dim, dropped);
  const Random fresh(recipe.seed, spec.name + "/drop"), noise(recipe.seed, spec.name + "/noise");
  const Box of_expert{{e, box.begin[1], box.begin[2]}, {1, box.size[1], box.size[2]}};
  map_elements(spec.shape, of_expert, target.unsqueeze(0), [&](uint64_t index, float x) -> double {
    const uint64_t in_expert = index % static_cast<uint64_t>(spec.shape[1] * columns);
    const auto unit = static_cast<size_t>(unit_dim == 0 ? in_expert / columns : in_expert % columns);
    if (dropped[unit]) return dense.mean + dense.deviation * fresh.normal(index);
    return recipe.noise > 0 ? x + recipe.noise * dense.rms * noise.normal(index) : x;
  });
}

/// The experts of `box`, in groups of those that have the same slice of the source: the copies of a shard, where they share one order; of
/// a mixture, those of one expert.
std::vector<std::vector<int64_t>> alike(const Box& box, const Recipe& recipe) {
  const int64_t G = recipe.granularity;
  const auto same = [&](int64_t a, int64_t b) {
    if (recipe.of_mixture()) return a / recipe.copies == b / recipe.copies;
    if (a % G != b % G || recipe.source_of(a / G) != recipe.source_of(b / G)) return false;
    return copies_share_order(recipe) || a == b;
  };
  std::vector<std::vector<int64_t>> out;
  for (int64_t e = box.begin[0]; e < box.begin[0] + box.size[0]; ++e) {
    const auto group = std::find_if(out.begin(), out.end(), [&](const std::vector<int64_t>& experts) { return same(experts.front(), e); });
    group == out.end() ? out.push_back({e}) : group->push_back(e);
  }
  return out;
}

/// What expert `e` is of the source: `box` (of the expert, [rows, columns]) of its slice, in the dtype that `read` gives.
Tensor source_slice(const ParameterSpec& spec, int64_t e, const Box& box, const Recipe& recipe, const ReadDense& read) {
  if (recipe.of_mixture()) {
    return read(spec.name, {{e / recipe.copies, box.begin[0], box.begin[1]}, {1, box.size[0], box.size[1]}}).select(0, 0);
  }
  const size_t unit_dim = matrix_of(spec) == Matrix::down ? 1 : 0, other_dim = 1 - unit_dim;
  const std::vector<int64_t> units = units_of_expert(recipe, spec.layer, e);
  const auto begin = units.begin() + box.begin[unit_dim];
  const ReadDense own = read.of(recipe.source_of(e / recipe.granularity));
  return read_units(own, dense_name(spec.name), static_cast<int64_t>(unit_dim), {begin, begin + box.size[unit_dim]}, box.begin[other_dim],
                    box.size[other_dim]);
}

/// The slices of the box's experts times `factor`; `disturbed`: with the recipe's noise and drop.
void grow_experts(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, const Tensor& target, double factor,
                  bool disturbed) {
  const Box needed{{box.begin[1], box.begin[2]}, {box.size[1], box.size[2]}}, all{{0, 0}, {spec.shape[1], spec.shape[2]}};
  for (const std::vector<int64_t>& experts : alike(box, recipe)) {
    // What the box needs, or the whole of it for its statistics; read once for all of them.
    Tensor slice = source_slice(spec, experts.front(), disturbed ? all : needed, recipe, read);
    if (disturbed) slice = slice.to(at::kFloat).contiguous();
    for (const int64_t e : experts) {
      const Tensor part = target.select(0, e - box.begin[0]);
      part.copy_(disturbed ? slice.narrow(0, box.begin[1], box.size[1]).narrow(1, box.begin[2], box.size[2]) : slice);
      if (disturbed) disturb(spec, box, e, recipe, slice, part);
      if (factor != 1.0) part.mul_(factor);
    }
  }
}

/// Every row of the source's, as often as there are copies.
void copy_rows(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, const Tensor& target) {
  for (const std::vector<int64_t>& experts : alike(box, recipe)) {
    const Tensor row = read(spec.name, {{experts.front() / recipe.copies, box.begin[1]}, {1, box.size[1]}}).select(0, 0);
    for (const int64_t e : experts) target.select(0, e - box.begin[0]).copy_(row);
  }
}

void grow_router(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, Tensor target) {
  if (recipe.of_mixture()) return copy_rows(spec, box, recipe, read, target);
  const auto h = static_cast<uint64_t>(spec.shape[1]), G = static_cast<uint64_t>(recipe.granularity);
  const double deviation = recipe.router_logit_std / std::sqrt(static_cast<double>(h));  // logits of a unit-RMS input get that std
  const Random random(recipe.seed, spec.name + "/router");
  map_elements(spec.shape, box, target, [&](uint64_t index, float) {
    const uint64_t copy = index / h / G;
    return deviation * random.normal(copy * h + index % h);
  });
  // An export in the source's dtype then gives the same logits.
  if (recipe.source.dtype != at::kFloat) target.copy_(target.to(recipe.source.dtype));
}

void check_target(const ParameterSpec& spec, const Box& box, const Tensor& target) {
  if (!inside(box, spec.shape)) throw std::logic_error(text(spec.name, ": box ", describe(box), " of ", describe(spec.shape)));
  if (target.scalar_type() != at::kFloat || !target.device().is_cpu() || target.sizes() != at::IntArrayRef(box.size)) {
    throw std::logic_error(text(spec.name, ": the target must be fp32 on the CPU, of the box's size ", describe(box.size)));
  }
}

}  // namespace

void grow(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, Tensor target) {
  check_target(spec, box, target);
  if (elements(box) == 0) return;
  switch (spec.role) {
    case Role::expert: return grow_experts(spec, box, recipe, read, target, factor_of(spec, recipe), recipe.noise > 0 || recipe.drop > 0);
    case Role::router: return grow_router(spec, box, recipe, read, target);
    default: target.copy_(read(spec.name, box));
  }
}

Tensor dense_slice(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read) {
  if (spec.role == Role::router && !recipe.of_mixture()) throw std::logic_error(spec.name + " has no dense value");
  const Tensor out = at::empty(box.size, at::kFloat);
  check_target(spec, box, out);
  if (elements(box) == 0) return out;
  if (spec.role == Role::expert) {
    grow_experts(spec, box, recipe, read, out, factor_of(spec, recipe), false);
  } else if (spec.role == Role::router) {
    copy_rows(spec, box, recipe, read, out);
  } else {
    out.copy_(read(spec.name, box));
  }
  return out;
}

void grow_moment(const ParameterSpec& spec, const Box& box, const Recipe& recipe, Moments how, bool second, const ReadDense& read, Tensor target) {
  check_target(spec, box, target);
  if (elements(box) == 0) return;
  const auto copies = static_cast<double>(recipe.copies);
  const double of_copy = how == Moments::copy ? 1 : second ? 1 / (copies * copies) : 1 / copies;   // out of a mixture
  if (spec.role == Role::router) {
    if (!recipe.of_mixture()) return void(target.zero_());
    copy_rows(spec, box, recipe, read, target);
    target.mul_(of_copy);
  } else if (spec.role == Role::expert) {
    const double share = static_cast<double>(recipe.moe.top_k) / static_cast<double>(recipe.moe.experts), weight = factor_of(spec, recipe);
    const double of_slice = how == Moments::copy ? 1 : second ? share / (weight * weight) : share / weight;
    grow_experts(spec, box, recipe, read, target, recipe.of_mixture() ? of_copy : of_slice, false);
  } else {
    target.copy_(read(spec.name, box));
  }
}

void initialise(const ParameterSpec& spec, const Box& box, const Architecture& architecture, uint64_t seed, Tensor target) {
  check_target(spec, box, target);
  if (spec.role == Role::norm) {
    target.fill_(1.0);
    return;
  }
  const double deviation = spec.residual ? 0.02 / std::sqrt(2.0 * static_cast<double>(architecture.layers)) : 0.02;
  const Random random(seed, spec.name + "/init");
  map_elements(spec.shape, box, target, [&](uint64_t index, float) { return deviation * random.normal(index); });
}

}  // namespace upcycle
