#pragma once
#include <functional>
#include <vector>

#include "config/run_config.hpp"
#include "model/weights.hpp"
#include "ops/adamw.hpp"

namespace upcycle {

/// AdamW on fp32 masters, gradients and moments: of the elements that this rank owns, all of its weights' or with ZeRO-1 its part of
/// each bucket. Norms and biases do not decay; routers have a learning-rate factor of their own.
/// Whatever decides (norm, clip factor, skip) is a device tensor: a step waits for nothing.
class Optimizer {
 public:
  using BucketFunction = std::function<void(size_t bucket)>;

  /// Training starts: see Weights::start_training.
  Optimizer(Weights&, const OptimizerSection&, double router_lr_scale);

  /// This rank's share of the squared norm of the whole model's gradient, fp64 scalar: a slice that several ranks hold counts once
  /// over all of them, so that the plain sum over the world is the squared norm. std::logic_error where a weight had no addition.
  /// From the first bucket to the last, in the order in which gradients are summed; `arrived` is called before each is read.
  Tensor squared_norm_share(const BucketFunction& arrived = {}) const;

  /// One update with the (reduced) gradients: clipped to the configured norm, at learning rate `lr`; skipped, with nothing
  /// changed, where `squared_norm` (fp64 scalar, of the whole model) is not finite, or `wanted` (bool scalar; undefined: yes) is false.
  /// Values become the masters, rounded. What the gradients are afterwards is undefined: see zero_gradients. From the last bucket to the first,
  /// as forward wants them; `updated` is called after each.
  void step(double lr, const Tensor& squared_norm, const Tensor& wanted = {}, const BucketFunction& updated = {});
  /// Before the first addition of a step, each time. Only what ops add to is zeroed, norms and routers; a matrix is left as it is and told
  /// so (Parameter::outdated): the first product of the step overwrites it. Until then main_grad is not to be looked at.
  void zero_gradients();
  /// Moments and the number of updates as they were before the first one.
  void forget();

  /// Updates done, fp32 device scalar; skipped ones do not count.
  Tensor& updates() noexcept { return updates_; }
  /// Moments of bucket `index` of weights.buckets(): of what this rank owns of it.
  Tensor& exp_avg(size_t index) { return exp_avg_[index]; }
  Tensor& exp_avg_sq(size_t index) { return exp_avg_sq_[index]; }

 private:
  Weights& weights_;
  OptimizerSection settings_;
  std::vector<Tensor> exp_avg_, exp_avg_sq_;   ///< by bucket
  std::vector<AdamWBuffer> buffers_;           ///< by bucket: what this rank owns of it
  /// A stretch of gradients whose squares are summed. All of them: what this rank owns.
  struct Squared {
    Tensor gradients;
    double share;               ///< 1 / the ranks that own the same elements
    const Parameter* whole;     ///< where it is just this weight's gradient, which no rank adds to after backward: its `squares` hold. Else null
  };
  std::vector<std::vector<Squared>> squared_;    ///< by bucket
  Tensor updates_;
  std::vector<Parameter*> overwritten_;        ///< whose first addition in a step overwrites
  std::vector<Tensor> zeroed_;                 ///< all other gradients: stretches of buckets
};

}  // namespace upcycle
