#include "ops/adamw.hpp"

#include <ATen/ops/_fused_adamw.h>

#include "base/autograd.hpp"

namespace upcycle {

void adamw_step(const AdamW& settings, std::vector<Tensor> masters, std::vector<Tensor> gradients, std::vector<Tensor> exp_avg,
                std::vector<Tensor> exp_avg_sq, const Tensor& step, const Tensor& gradient_divisor, const Tensor& skip) {
  if (masters.empty()) return;
  const Unrecorded guard;
  const std::vector<Tensor> steps(masters.size(), step);  // one counter for all
  at::_fused_adamw_(masters, gradients, exp_avg, exp_avg_sq, /*max_exp_avg_sqs=*/{}, steps, settings.lr, settings.beta1,
                    settings.beta2, settings.weight_decay, settings.eps, /*amsgrad=*/false, /*maximize=*/false,
                    gradient_divisor, skip);
}

}  // namespace upcycle
