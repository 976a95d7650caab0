// N experts, e one of them; C copies, c one of them; G shards, g one of them; h hidden
#include "upcycle/grow.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "base/error.hpp"
#include "base/rng.hpp"
#include "upcycle/disturb.hpp"
#include "upcycle/map_elements.hpp"
#include "upcycle/units.hpp"

namespace upcycle {
namespace {

/// Which of the expert's three matrices.
enum class Matrix { gate, up, down };

Matrix matrix_of(const ParameterSpec& spec) {
  if (spec.name.ends_with(".gate_proj.weight")) return Matrix::gate;
  if (spec.name.ends_with(".up_proj.weight")) return Matrix::up;
  return Matrix::down;
}

/// Along which dim of the expert's matrix its hidden units lie.
int64_t unit_dim_of(const ParameterSpec& spec) { return matrix_of(spec) == Matrix::down ? 1 : 0; }

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

/// What is known about expert `e`; the caller's, or, where it keeps nothing, `own`.
ExpertFacts& facts_of(const ParameterSpec& spec, int64_t e, const Recipe& recipe, ExpertFacts* kept, ExpertFacts& own) {
  ExpertFacts& facts = kept ? *kept : own;
  if (facts.expert == e && facts.name == spec.name) return facts;
  facts = {};
  facts.name = spec.name, facts.expert = e;
  if (!recipe.of_mixture()) facts.units = units_of_expert(recipe, spec.layer, e);
  return facts;
}

/// What the expert of `facts` is of the source: `box` (of the expert, [rows, columns]) of its slice, in the dtype that `read` gives.
Tensor source_slice(const ParameterSpec& spec, const ExpertFacts& facts, const Box& box, const Recipe& recipe, const ReadDense& read) {
  const int64_t e = facts.expert;
  if (recipe.of_mixture()) {
    return read(spec.name, {{e / recipe.copies, box.begin[0], box.begin[1]}, {1, box.size[0], box.size[1]}}).select(0, 0);
  }
  const auto unit_dim = static_cast<size_t>(unit_dim_of(spec)), other_dim = 1 - unit_dim;
  const auto begin = facts.units.begin() + box.begin[unit_dim];
  const ReadDense own = read.of(recipe.source_of(e / recipe.granularity));
  return read_units(own, dense_name(spec.name), static_cast<int64_t>(unit_dim), {begin, begin + box.size[unit_dim]}, box.begin[other_dim],
                    box.size[other_dim]);
}

/// `x` times `factor`. Equal dtypes: once through memory.
void copy_times(const Tensor& x, double factor, Tensor target) {
  if (factor != 1.0 && x.scalar_type() == target.scalar_type()) {
    at::mul_out(target, x, at::scalar_tensor(factor, at::kDouble));
    return;
  }
  target.copy_(x);
  if (factor != 1.0) target.mul_(factor);
}

/// The slices of the box's experts times `factor`; `disturbed`: with the recipe's noise and drop.
void grow_experts(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, const Tensor& target, double factor,
                  bool disturbed, ExpertFacts* kept = nullptr) {
  constexpr int64_t kShownElements = 1 << 20;
  const Box needed{{box.begin[1], box.begin[2]}, {box.size[1], box.size[2]}}, all{{0, 0}, {spec.shape[1], spec.shape[2]}};
  ExpertFacts own;
  for (const std::vector<int64_t>& experts : alike(box, recipe)) {
    // What the box needs, or the whole of it for its statistics; read once for all of them.
    const bool whole_slice = disturbed && !kept;
    Tensor slice = source_slice(spec, facts_of(spec, experts.front(), recipe, kept, own), whole_slice ? all : needed, recipe, read);
    if (disturbed) slice = slice.to(at::kFloat).contiguous();
    for (const int64_t e : experts) {
      const Tensor part = target.select(0, e - box.begin[0]);
      if (!disturbed) {
        copy_times(slice, factor, part);
        continue;
      }
      part.copy_(whole_slice ? slice.narrow(0, box.begin[1], box.size[1]).narrow(1, box.begin[2], box.size[2]) : slice);
      ExpertFacts& facts = facts_of(spec, e, recipe, kept, own);
      disturb(spec, box, unit_dim_of(spec), recipe, [&](const SeeRows& see) {
        if (whole_slice) return see(0, slice);
        const int64_t step = std::max<int64_t>(1, kShownElements / spec.shape[2]);
        for (int64_t row = 0; row < spec.shape[1]; row += step) {
          const Box rows{{row, 0}, {std::min(step, spec.shape[1] - row), spec.shape[2]}};
          see(row, source_slice(spec, facts, rows, recipe, read).to(at::kFloat).contiguous());
        }
      }, part, facts);
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

void check_target(const ParameterSpec& spec, const Box& box, const Tensor& target, at::ScalarType dtype = at::kFloat) {
  if (!inside(box, spec.shape)) throw std::logic_error(text(spec.name, ": box ", describe(box), " of ", describe(spec.shape)));
  if (target.scalar_type() != dtype || !target.device().is_cpu() || target.sizes() != at::IntArrayRef(box.size)) {
    throw std::logic_error(text(spec.name, ": the target must be ", dtype, " on the CPU, of the box's size ", describe(box.size)));
  }
}

}  // namespace

std::string source_name(const ParameterSpec& spec, const Recipe& recipe) {
  if (recipe.of_mixture() || (spec.role != Role::expert && spec.role != Role::router)) return spec.name;
  return spec.role == Role::expert ? dense_name(spec.name) : "";
}

bool keeps(const ParameterSpec& spec, const Recipe& recipe, at::ScalarType dtype) {
  if (dtype == at::kFloat) return true;
  if (dtype != at::kBFloat16) return false;   // fp16 overflows where fp32 does not
  if (spec.role == Role::router) return recipe.of_mixture();
  // A factor below one could shift bits out of the smallest numbers.
  if (spec.role == Role::expert) return recipe.lossless() && factor_of(spec, recipe) >= 1.0;
  return recipe.quotas.empty();   // a mean of several sources is rounded
}

void grow(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, Tensor target, ExpertFacts* facts) {
  check_target(spec, box, target, keeps(spec, recipe, target.scalar_type()) ? target.scalar_type() : at::kFloat);
  if (elements(box) == 0) return;
  switch (spec.role) {
    case Role::expert: return grow_experts(spec, box, recipe, read, target, factor_of(spec, recipe), recipe.noise > 0 || recipe.drop > 0, facts);
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
