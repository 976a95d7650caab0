#pragma once
#include <string>
#include <vector>

#include "base/tensor.hpp"
#include "model/catalogue.hpp"
#include "upcycle/read_dense.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// What grow() found out about one expert's matrix, kept by a caller that asks for it box by box, so that its order and its statistics
/// are made once and not for every box. It knows one expert, the last.
struct ExpertFacts {
  std::string name;             ///< of the parameter
  int64_t expert = -1;
  std::vector<int64_t> units;   ///< of the dense feed-forward, in the expert's order
  bool measured = false;        ///< what follows is known
  std::vector<bool> dropped;    ///< which of its units are drawn anew
  double rms = 0, mean = 0, deviation = 0;   ///< of its slice of the source: of all, and of the dropped units
};

/// The tensor of the source that `spec` comes out of; "" for the routers of a dense source, which come out of none.
std::string source_name(const ParameterSpec& spec, const Recipe& recipe);

/// Whether everything that becomes of `spec` out of a source that stores it as `dtype` is a value of `dtype`: then grow() takes a
/// target of that dtype, and nothing is rounded. True of bf16 for dense values times powers of two and for all that is not changed;
/// for fp32, of course.
bool keeps(const ParameterSpec& spec, const Recipe& recipe, at::ScalarType dtype);

/// Fills `target` (CPU, fp32 or what keeps() allows, box.size, may be strided) with `box` of MoE parameter `spec`. A pure function of the dense
/// tensors, the recipe and its seed: neighbours, ranks and order do not matter. Reads only the dense slices it needs, plus, for
/// `noise` and `drop`, the whole expert's matrix (its statistics): at once, or, with `facts`, 4 MiB at a time.
/// How a value comes about: expert (c, g) is rows [g*f/G, (g+1)*f/G) of gate and up and the same columns of down, in its copy's order
/// of the hidden units (units.hpp), times the recipe's factor of that matrix; `drop` draws some hidden units anew from the normal distribution of what they replace; `noise`
/// adds noise * rms(the expert's dense slice) * N(0, 1) to the others. Router rows ~ N(0, router_logit_std / sqrt(h)), one row
/// a copy, rounded to the source's dtype. Everything else is the dense tensor. Expert values are fp32 and not rounded.
/// Of several sources, a copy's experts are of its own source, and all else is their mean.
/// Out of a mixture: experts and router rows are the source's, each as often as the recipe says, noise and drop likewise.
void grow(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read, Tensor target, ExpertFacts* facts = nullptr);

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
