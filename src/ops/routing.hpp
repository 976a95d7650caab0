#pragma once
#include "base/tensor.hpp"

// Shapes: T tokens, K choices of each, E experts, P parts of a micro-batch whose loads are looked at apart, N blocks of a kernel.
// What a router does with its logits on a GPU, each as one pass over them; moe/router.cpp has it written out in tensors, for everything else.
namespace upcycle {

/// fp32 on a GPU, and no more experts than the kernels take.
bool routes_in_one_pass(const Tensor& logits_TE);

struct RoutingRules {
  int64_t top_k = 0;
  bool renormalise = true;    ///< weights: softmax over the chosen logits; else probabilities over all experts
  Tensor bias_E;              ///< fp32, added to the logits for the choice alone; undefined: none
  Tensor expert_TK;           ///< int64, the choice; undefined: choose_experts()' rule
  int64_t parts = 0;          ///< P; 0: no sums for balance losses are wanted
  Tensor part_T;              ///< int64, of which part each token is; undefined: P = 1
};

/// Without a graph; nothing here is differentiable by itself.
struct RoutingPass {
  Tensor expert_TK;           ///< int64, best first
  Tensor weight_TK;           ///< fp32
  Tensor count_E;             ///< int64, choices
  Tensor log_sum_T;           ///< fp32, log of the sum of exponentials
  // Where P > 0:
  Tensor count_PE;            ///< int64, choices of each part
  Tensor probability_PE;      ///< int64, sums of probabilities in units of 2^-36: the same in any order
  Tensor measure_N2;          ///< fp32, sums of log_sum^2 and of the entropy
};
/// Nothing waits; two runs give the same bits.
RoutingPass routing_pass(const Tensor& logits_TE, const RoutingRules& rules);

/// Shares of the experts in the choices, fp32 [P, E]; and the measures of what the pass has summed, into a router's statistics.
/// `count_PE`: the choices that shares are made of, int64 [P, E], over all ranks; undefined: all experts alike. `choices`: those of one
/// part; 0: as many as count_PE says (P = 1). `tokens`: of the micro-batch on all ranks. Adds count_E to `seen_E` (int64), and
/// [E / tokens * sum share * probability, sum log_sum^2 / tokens, sum entropy / tokens] to `measures_3` (fp64); both are made if undefined.
Tensor routing_shares(const RoutingPass& pass, const Tensor& count_PE, double choices, double tokens, Tensor& seen_E, Tensor& measures_3);

/// What of a loss comes to the logits beside the weights' gradient.
struct RoutingLosses {
  Tensor share_PE;            ///< undefined: no balance loss
  Tensor part_T;
  double aux = 0.0;           ///< d loss / d probability = aux * share
  double z = 0.0;             ///< d loss / d log_sum = z * log_sum
};
/// d_logits [T, E], from what the pass gave.
Tensor routing_gradient(const Tensor& logits_TE, const Tensor& log_sum_T, const Tensor& expert_TK, const Tensor& weight_TK,
                        const Tensor& d_weight_TK, bool renormalise, const RoutingLosses& losses);

}  // namespace upcycle
