#pragma once
#include "config/run_config.hpp"
#include "moe/router.hpp"
#include "parallel/communicator.hpp"

// Shapes: T tokens of this rank, K choices of each, E experts.
namespace upcycle {

/// How many choices of a micro-batch one expert takes, and which (GShard, 2006.16668; Switch, 2101.03961).
struct CapacitySettings {
  double factor = 0.0;                          ///< 0: every choice is kept
  DropPolicy policy = DropPolicy::weight;
};

/// ceil(factor * tokens * K / E): the share of an expert at balance, times the factor.
int64_t capacity_of(double factor, int64_t tokens, int64_t top_k, int64_t experts);

/// The routing without the choices that find their expert full: an expert keeps capacity_of(the micro-batch's tokens) choices, those of
/// the highest weight or those of the first tokens; of equals the first token's. A dropped choice contributes nothing: in expert_TK it
/// names expert E, which there is none; the weights of the token's other choices stay what they are.
/// `token_T`: the number of each token, the order of which is that of the micro-batch. `sharing`: the ranks that share the micro-batch,
/// each with as many of its tokens. They all decide from the whole of it, so the layout changes nothing. **Collective** over them.
Routing limited(const Routing& routing, const Tensor& token_T, const Communicator& sharing, const CapacitySettings& settings);

}  // namespace upcycle
