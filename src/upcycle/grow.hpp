#pragma once
#include <functional>
#include <string>

#include "model/catalogue.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// Reads `box` of dense tensor `name` (CPU, any float dtype). The caller decides where from.
using ReadDense = std::function<at::Tensor(const std::string& name, const Box& box)>;

/// Fills `target` (CPU, fp32, box.size, may be strided) with `box` of MoE parameter `spec`. A pure function of the dense
/// tensors, the recipe and its seed: neighbours, ranks and order do not matter. Reads only the dense slices it needs, plus, for
/// `drop`, the whole expert's matrix (its statistics).
void grow(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, at::Tensor target);

/// Random initialisation of `box`: norms 1, matrices N(0, 0.02), those that write into the residual stream N(0, 0.02/sqrt(2L)).
void initialise(const ParameterSpec& spec, const Box& box, const Architecture&, uint64_t seed, at::Tensor target);

}  // namespace upcycle
