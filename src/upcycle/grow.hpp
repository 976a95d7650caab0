#pragma once
#include <functional>
#include <string>

#include "base/tensor.hpp"
#include "model/catalogue.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// Reads `box` of dense tensor `name` (CPU, any float dtype). The caller decides where from.
using ReadDense = std::function<Tensor(const std::string& name, const Box& box)>;

/// Fills `target` (CPU, fp32, box.size, may be strided) with `box` of MoE parameter `spec`. A pure function of the dense
/// tensors, the recipe and its seed: neighbours, ranks and order do not matter. Reads only the dense slices it needs, plus, for
/// `drop`, the whole expert's matrix (its statistics).
/// How a value comes about: expert (c, g) is rows [g*f/G, (g+1)*f/G) of gate and up and the same columns of down, times the
/// recipe's factor of that matrix; `drop` draws some hidden units anew from the normal distribution of what they replace; `noise`
/// adds noise * rms(the expert's dense slice) * N(0, 1) to the others. Router rows ~ N(0, router_logit_std / sqrt(h)), one row
/// a copy, rounded to the source's dtype. Everything else is the dense tensor. Expert values are fp32 and not rounded.
void grow(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, Tensor target);

/// Random initialisation of `box`: norms 1, matrices N(0, 0.02), those that write into the residual stream N(0, 0.02/sqrt(2L)).
void initialise(const ParameterSpec& spec, const Box& box, const Architecture&, uint64_t seed, Tensor target);

}  // namespace upcycle
