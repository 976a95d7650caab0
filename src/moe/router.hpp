#pragma once
#include "ops/parameter.hpp"
#include "parallel/communicator.hpp"

// Shapes: T tokens, K choices of each, E experts of the whole layer, D width.
namespace upcycle {

/// Which experts each token goes to, and with what weight.
struct Routing {
  Tensor expert_TK;   ///< int64; best first
  Tensor weight_TK;   ///< fp32, differentiable
  Tensor count_E;     ///< int64, choices per expert; device tensor
};

/// What the router adds to the loss. Coefficients are already divided by the number of micro-batches that make a step.
struct BalanceLoss {
  double aux = 0.0;   ///< Switch loss (Fedus et al., 2101.03961), E * sum_e share_e * mean probability_e: 1 at balance
  double z = 0.0;     ///< mean of logsumexp(logits)^2 (Zoph et al., 2202.08906)
};

/// What a router saw while recording, summed over micro-batches since the last reset; device tensors. Undefined before the first.
struct RouterStatistics {
  Tensor count_E;     ///< int64 [E]
  Tensor losses_2;    ///< fp64 [aux, z] without their coefficients, summed over micro-batches
};

struct RouterSettings {
  int64_t top_k = 0;
  bool renormalise = true;    ///< weights: softmax over the chosen logits; else probabilities over all experts
};

/// The experts with the K largest logits, best first; int64 [T, K]. One total order on all devices and layouts: by fp32 value,
/// then the lower index. With copy-major experts that makes every tie between copies harmless: whole copies win.
Tensor choose_experts(const Tensor& logits_TE, int64_t top_k);

class Router {
 public:
  Router(Parameter& weight_ED, RouterSettings settings);
  /// `x` [T, D]; logits, softmax and weights in fp32 whatever x's dtype. While recording, the balance losses are attached to the
  /// weights: backward adds their gradients; nothing else is handed on.
  Routing forward(const Tensor& x_TD, const BalanceLoss& balance);
  /// fp32 [T, E].
  Tensor logits(const Tensor& x_TD);

  const RouterStatistics& statistics() const noexcept { return statistics_; }
  void reset_statistics() { statistics_ = {}; }

 private:
  void count(const Tensor& count_E, const Tensor& aux, const Tensor& z);

  Parameter& weight_ED_;
  RouterSettings settings_;
  RouterStatistics statistics_;
};

}  // namespace upcycle
