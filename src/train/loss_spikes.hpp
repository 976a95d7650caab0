#pragma once
#include <nlohmann/json.hpp>

#include "base/tensor.hpp"

namespace upcycle {

/// Judges a step's loss by those before it, on the device: the host waits for nothing. A loss is a spike where it is more than `factor`
/// standard deviations above the mean of the last 128 good ones; until there are 64, none is. That is OLMo's rule (2501.00656 has the
/// runs; SkipStepOptimizer of OLMo-core the code, with a factor of 6), for the loss alone. Spikes and steps whose gradient was not finite
/// do not enter the window, so that a long one does not become the custom.
class LossSpikes {
 public:
  static constexpr int64_t kWindow = 128;

  /// `factor` 0: judge() is not to be called, and there is nothing to remember.
  LossSpikes(double factor, at::Device device);

  /// `loss`: fp64 scalar, the same on all ranks; `finite`: bool scalar, whether the step's gradient was. Whether it is a spike (bool
  /// scalar); remembers it where it is good.
  Tensor judge(const Tensor& loss, const Tensor& finite);

  /// The good losses of the window, the oldest first, as a list: what a checkpoint keeps, so that a run that was stopped judges as one
  /// that was not. Waits for the device.
  nlohmann::json state() const;
  /// Puts them back, bit for bit; null or empty: none. More than a window: the last of them. Throws UserError for what is no number.
  void restore(const nlohmann::json& losses);

 private:
  double factor_;
  Tensor loss_W_;   ///< fp64, the newest last; NaN where there is none yet
};

}  // namespace upcycle
