#pragma once
#include <cmath>

#include "base/rng.hpp"
#include "support/numbers.hpp"
#include "train/start.hpp"

namespace upcycle {

/// Random weights that do not depend on the layout: matrices keep the size of what they multiply; routers decide clearly.
/// `tied_routers` experts in a row share a router row, as the shards of a copy do.
inline Fill decided_weights(uint64_t seed, int64_t tied_routers = 1) {
  return [seed, tied_routers](const ParameterSpec& spec, const Box& box, Tensor target) {
    Tensor x = normal(spec.shape, Random(seed, spec.name).bits(0));
    if (spec.role == Role::router) x = x.narrow(0, 0, spec.shape[0] / tied_routers).repeat_interleave(tied_routers, 0);
    const double spread = spec.role == Role::router ? 2.0 : spec.role == Role::embedding ? 0.5 * std::sqrt(spec.shape[1]) : 1.0;
    x = spec.role == Role::norm ? 1 + 0.2 * x : x * (spread / std::sqrt(static_cast<double>(spec.shape.back())));
    for (size_t d = 0; d < box.begin.size(); ++d) x = x.narrow(static_cast<int64_t>(d), box.begin[d], box.size[d]);
    target.copy_(x);
  };
}

/// For models of one rank: matrices of twice the size that keeps the size of what they multiply.
inline Fill wide_weights(uint64_t seed) {
  return [seed](const ParameterSpec& spec, const Box&, Tensor target) {
    const Tensor x = normal(spec.shape, Random(seed, spec.name).bits(0));
    target.copy_(spec.role == Role::norm ? 1 + 0.2 * x : x * (2 / std::sqrt(static_cast<double>(spec.shape.back()))));
  };
}

}  // namespace upcycle
