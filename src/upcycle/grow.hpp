#pragma once
#include "base/tensor.hpp"
#include "model/catalogue.hpp"
#include "upcycle/read_dense.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// Fills `target` (CPU, fp32, box.size, may be strided) with `box` of MoE parameter `spec`. A pure function of the dense
/// tensors, the recipe and its seed: neighbours, ranks and order do not matter. Reads only the dense slices it needs, plus, for
/// `drop`, the whole expert's matrix (its statistics).
/// How a value comes about: expert (c, g) is rows [g*f/G, (g+1)*f/G) of gate and up and the same columns of down, in its copy's order
/// of the hidden units (units.hpp), times the recipe's factor of that matrix; `drop` draws some hidden units anew from the normal distribution of what they replace; `noise`
/// adds noise * rms(the expert's dense slice) * N(0, 1) to the others. Router rows ~ N(0, router_logit_std / sqrt(h)), one row
/// a copy, rounded to the source's dtype. Everything else is the dense tensor. Expert values are fp32 and not rounded.
/// Of several sources, a copy's experts are of its own source, and all else is their mean.
/// Out of a mixture: experts and router rows are the source's, each as often as the recipe says, noise and drop likewise.
void grow(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, Tensor target);

/// What `box` of MoE parameter `spec` was before anything random was done to it: experts are their dense slice times the recipe's
/// factor, without `noise` and `drop`; everything but experts and routers is the dense tensor. A new fp32 CPU tensor of box.size.
/// For measures of how far training has led. Out of a mixture: copies of the source's. Throws std::logic_error for the routers of a
/// dense source, which have no such value.
Tensor dense_slice(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read);

/// Fills `target` with `box` of a moment of Adam (the first, or the `second`) of MoE parameter `spec`, out of the dense model's, which
/// `read` reads. Experts: their dense slice; with Moments::scaled times phi / factor, and phi / factor^2 for the second: an expert gets a
/// share phi = K/N of the tokens, and a weight that is `factor` times as large a gradient that much smaller. Routers: 0. The rest: the
/// dense model's. Noise and drop change nothing. Out of a mixture copies of an expert are chosen together and share its weight, and their
/// gradients and their router rows' are 1/C of it: scaled by 1/C and 1/C^2.
void grow_moment(const ParameterSpec& spec, const Box& box, const Recipe& recipe, Moments how, bool second, const ReadDense& read, Tensor target);

/// Random initialisation of `box`: norms 1, matrices N(0, 0.02), those that write into the residual stream N(0, 0.02/sqrt(2L)).
void initialise(const ParameterSpec& spec, const Box& box, const Architecture&, uint64_t seed, Tensor target);

}  // namespace upcycle
