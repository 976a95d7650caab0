#pragma once
#include "moe/balance_loss.hpp"
#include "ops/parameter.hpp"

// Shapes: T tokens of this rank, K choices of each, E experts of the whole layer, D width.
namespace upcycle {

/// Which experts each token goes to, and with what weight.
struct Routing {
  Tensor expert_TK;   ///< int64; best first
  Tensor weight_TK;   ///< fp32, differentiable
  Tensor count_E;     ///< int64, choices per expert; device tensor
  /// Choices of a micro-batch that an expert takes; 0: all of them. Those it did not take name expert E (see capacity.hpp).
  int64_t capacity = 0;
};

/// Noise on what the router sees in training (Switch Transformer, 2101.03961, section 2.4): each element times 1 + size * U[-1, 1).
/// Counter-based: the same for a token on any rank and when a layer is computed again.
struct Jitter {
  double size = 0.0;
  uint64_t seed = 0;
};

/// What a router is told of the micro-batch, the same for all layers. Nothing of it for validation: {}.
struct RouterContext {
  BalanceLoss balance;
  Jitter jitter;
  Tensor token_T;     ///< int64, the number of each token in the training stream; for jitter and capacities
  /// The choice of an earlier pass over the same tokens of this layer; undefined: the router chooses. For layers that are computed
  /// again: losses are attached, and tokens counted, in the pass that records, once, whoever chose.
  Tensor expert_TK;
};

/// What a router saw while recording, summed over micro-batches since the last reset; device tensors. Undefined before the first.
struct RouterStatistics {
  Tensor count_E;      ///< int64 [E]
  Tensor measures_3;   ///< fp64 [aux, z, entropy], see Measures
  Tensor dropped;      ///< int64 scalar, choices that found their expert full
};

/// What a router remembers from step to step: the same on all ranks, stored in checkpoints.
struct RouterState {
  Tensor bias_E;      ///< fp32, added to the logits for the choice alone (2408.15664); undefined: zeros
  Tensor count_E;     ///< int64, choices over the last whole step; undefined: none yet
};

struct RouterSettings {
  int64_t top_k = 0;
  bool renormalise = true;    ///< weights: softmax over the chosen logits; else probabilities over all experts
  int64_t layer = 0;          ///< whose router this is
};

/// The experts with the K largest logits, best first; int64 [T, K]. One total order on all devices and layouts: by fp32 value,
/// then the lower index. With copy-major experts that makes every tie between copies harmless: whole copies win.
Tensor choose_experts(const Tensor& logits_TE, int64_t top_k);

class Router {
 public:
  /// `sharing`: the ranks that share a micro-batch, each with as many of its tokens.
  Router(Parameter& weight_ED, const Communicator& sharing, RouterSettings settings);
  /// **Collective** over the sharing ranks while recording. `x` [T, D]; logits, softmax and weights in fp32 whatever x's dtype. While
  /// recording, the balance losses are attached to the weights: backward adds their gradients; nothing else is handed on.
  Routing forward(const Tensor& x_TD, const RouterContext& context);
  /// The same from the logits on: two kernels where routes_in_one_pass(), and one in backward; else written out.
  Routing route(const Tensor& logits_TE, const RouterContext& context);
  /// The same in tensors, on any device.
  Routing route_written_out(const Tensor& logits_TE, const RouterContext& context);
  /// fp32 [T, E]; without bias or noise.
  Tensor logits(const Tensor& x_TD);

  RouterStatistics& statistics() noexcept { return statistics_; }
  void reset_statistics() { statistics_ = {}; }
  RouterState& state() noexcept { return state_; }
  int64_t layer() const noexcept { return settings_.layer; }

 private:
  Tensor biased(const Tensor& logits_TE) const;
  void count(const Tensor& count_E, const Measures& measures);

  Parameter& weight_ED_;
  const Communicator* sharing_;
  RouterSettings settings_;
  RouterStatistics statistics_;
  RouterState state_;
};

}  // namespace upcycle
