#include "upcycle/merge.hpp"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "upcycle/units.hpp"

namespace upcycle {

Tensor merged(const ParameterSpec& spec, const Recipe& recipe, const ReadDense& read) {
  if (spec.role != Role::feed_forward || !recipe.moe.is_moe_layer(spec.layer)) return read(spec.name, whole(spec.shape));
  const size_t dot = spec.name.rfind(".mlp.") + 4;
  const std::string matrix = spec.name.substr(dot + 1), experts = spec.name.substr(0, dot) + ".experts." + matrix;
  const bool down = matrix.starts_with("down"), up = matrix.starts_with("up");
  const int64_t unit_dim = down ? 1 : 0, fe = recipe.moe.expert_ffn, other = spec.shape[static_cast<size_t>(1 - unit_dim)];
  const double factor = down ? recipe.down_factor : up ? recipe.up_factor : recipe.gate_factor;
  // fp64 holds the sum of equal fp32 numbers exactly, so that the mean of equal copies is each of them.
  const Tensor sum = at::zeros(spec.shape, at::kDouble);
  for (int64_t e = 0; e < recipe.moe.experts; ++e) {
    const Box box{{e, 0, 0}, {1, down ? other : fe, down ? fe : other}};
    const Tensor value = read(experts, box).select(0, 0).to(at::kDouble).div(factor);
    sum.index_add_(unit_dim, at::tensor(units_of_expert(recipe, spec.layer, e), at::kLong), value);
  }
  return sum.div_(static_cast<double>(recipe.copies)).to(at::kFloat);
}

}  // namespace upcycle
