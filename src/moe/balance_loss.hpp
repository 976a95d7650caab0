#pragma once
#include "config/run_config.hpp"
#include "ops/routing.hpp"
#include "parallel/communicator.hpp"

// Shapes: T tokens of this rank, K choices of each, E experts, B sequences of the micro-batch.
namespace upcycle {

/// What a router adds to the loss. Coefficients are already divided by the number of micro-batches that make a step, over all ranks.
/// E * sum_e share_e * mean probability_e (Switch Transformer, Fedus et al., 2101.03961) is 1 at balance. What it is that should be
/// in balance is the scope: the choices of
///   batch     each micro-batch;
///   sequence  each sequence; the mean over sequences (DeepSeek-V3, 2412.19437);
///   global    the whole step's batch (Qwen, 2501.11873). Its choices are known when the step is over, so the shares are those of
///             the step before: the same on any layout, and nothing waits in forward. The first step takes all experts for balanced.
struct BalanceLoss {
  double aux = 0.0;
  double z = 0.0;            ///< mean of logsumexp(logits)^2 (Zoph et al., 2202.08906)
  BalanceScope scope = BalanceScope::batch;
  int64_t sequences = 1;     ///< B; for scope sequence
  Tensor sequence_T;         ///< int64, which of them each row belongs to; for scope sequence
};

/// This rank's part of three means over the tokens of a micro-batch: the plain sum over the ranks that share it is the mean. So are the
/// gradients of aux and z.
struct Measures {
  Tensor aux;        ///< differentiable
  Tensor z;          ///< differentiable
  Tensor entropy;    ///< of the probabilities, in nats
};

/// **Collective** over `sharing`, whose ranks hold T tokens each. `count_E`: this rank's choices, int64; `last_E`: those of the step
/// before, over all ranks, for scope global (undefined: balanced).
Measures measure(const Communicator& sharing, const BalanceLoss& loss, const Tensor& logits_TE, const Tensor& probability_TE,
                 const Tensor& expert_TK, const Tensor& count_E, const Tensor& last_E);

/// The same of what one pass over the logits has summed: adds count_E and the measures into a router's statistics, and returns what of the
/// losses comes to the logits. The pass's parts are the sequences for scope sequence, else one. **Collective** like measure().
RoutingLosses add_measures(const Communicator& sharing, const BalanceLoss& loss, const RoutingPass& pass, const Tensor& last_E,
                           Tensor& seen_E, Tensor& measures_3);

/// `bias_E` after a step whose global batch made `count_E` choices: bias + rate * sign(mean count - count) (Wang et al., 2408.15664),
/// unchanged where `applied` (bool scalar) is false.
Tensor moved_bias(const Tensor& bias_E, const Tensor& count_E, double rate, const Tensor& applied);

}  // namespace upcycle
