#pragma once
#include <vector>

#include "config/run_config.hpp"
#include "model/weights.hpp"

namespace upcycle {

/// AdamW on fp32 masters, gradients and moments. Norms and biases do not decay; routers have a learning-rate factor of their own.
/// Whatever decides (norm, clip factor, skip) is a device tensor: a step waits for nothing.
class Optimizer {
 public:
  Optimizer(Weights&, const OptimizerSection&, double router_lr_scale);

  /// This rank's share of the squared norm of the whole model's gradient, fp64 scalar: a slice that several ranks hold counts once
  /// over all of them, so that the plain sum over the world is the squared norm.
  Tensor squared_norm_share() const;

  /// One update with the (reduced) gradients: clipped to the configured norm, at learning rate `lr`; skipped, with nothing
  /// changed, where `squared_norm` (fp64 scalar, of the whole model) is not finite. Publishes masters into values.
  void step(double lr, const Tensor& squared_norm);
  void zero_gradients();

  /// Updates done, fp32 device scalar; skipped ones do not count.
  Tensor& updates() noexcept { return updates_; }
  /// Moments of weight `index` of weights.all(), shaped like its value.
  Tensor& exp_avg(size_t index) { return exp_avg_[index]; }
  Tensor& exp_avg_sq(size_t index) { return exp_avg_sq_[index]; }

 private:
  struct Group {
    bool decays;
    double lr_scale;
    std::vector<size_t> members;   ///< indices into weights.all()
  };
  Weights& weights_;
  OptimizerSection settings_;
  std::vector<Group> groups_;
  std::vector<double> copies_;     ///< ranks that hold the same slice
  std::vector<Tensor> exp_avg_, exp_avg_sq_;
  Tensor updates_;
};

}  // namespace upcycle
