#pragma once
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

struct AdamW {
  double lr;
  double beta1, beta2;
  double eps;
  double weight_decay;
};

/// One step of AdamW (Loshchilov & Hutter, 1711.05101; decay times lr, not scaled by the moments) on fp32 tensors, in place:
/// masters, first and second moments. Everything that decides is a device tensor, so that the host need not wait:
/// `step` fp32 scalar, the number of this update (>= 1); gradients are divided by `gradient_divisor` (fp32 scalar) first, in
/// place; nothing is changed where `skip` (fp32 scalar) is 1.
void adamw_step(const AdamW& settings, std::vector<Tensor> masters, std::vector<Tensor> gradients, std::vector<Tensor> exp_avg,
                std::vector<Tensor> exp_avg_sq, const Tensor& step, const Tensor& gradient_divisor, const Tensor& skip);

/// Elements [begin, end) of a flat buffer that are updated alike.
struct AdamWRun {
  int64_t begin, end;
  double lr_scale;   ///< times AdamW::lr
  bool decays;       ///< else AdamW::weight_decay counts as 0
};

/// Weights end to end, and what belongs to them: contiguous and of one size.
class AdamWBuffer {
 public:
  /// fp32 masters, gradients and moments; `values`: the masters in the compute dtype, undefined where the masters are the values. Runs in
  /// order; each begins at a multiple of 4 elements (std::logic_error), and what is between them is zero in all tensors and stays so.
  /// Waits for the device once.
  AdamWBuffer(Tensor masters, Tensor gradients, Tensor exp_avg, Tensor exp_avg_sq, Tensor values, std::vector<AdamWRun> runs);

  /// adamw_step on all runs, and values = masters, rounded. On a GPU (values bf16 or undefined) one kernel in one pass, 30 bytes an element
  /// and 2 less without values, which leaves the gradients as they are. Elsewhere they are left divided.
  void step(const AdamW& settings, const Tensor& step, const Tensor& gradient_divisor, const Tensor& skip) const;
  /// The plain form, on any device; gradients are left divided.
  void step_written_out(const AdamW& settings, const Tensor& step, const Tensor& gradient_divisor, const Tensor& skip) const;

  const Tensor& gradients() const noexcept { return gradients_; }
  const std::vector<AdamWRun>& runs() const noexcept { return runs_; }

 private:
  Tensor masters_, gradients_, exp_avg_, exp_avg_sq_, values_;
  std::vector<AdamWRun> runs_;
  Tensor stretches_;   ///< on a GPU: fp64 [runs that differ from the one before, 3]: begin, lr_scale, whether it decays
};

}  // namespace upcycle
