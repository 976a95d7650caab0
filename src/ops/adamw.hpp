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

}  // namespace upcycle
