#include "train/optimizer.hpp"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "base/autograd.hpp"
#include "ops/adamw.hpp"

namespace upcycle {

Optimizer::Optimizer(Weights& weights, const OptimizerSection& settings, double router_lr_scale)
    : weights_(weights), settings_(settings) {
  for (size_t index = 0; index < weights.all().size(); ++index) {
    const Weight& weight = weights.all()[index];
    const bool decays = weight.spec().decays();
    const double lr_scale = weight.spec().role == Role::router ? router_lr_scale : 1.0;
    const auto same = [&](const Group& group) { return group.decays == decays && group.lr_scale == lr_scale; };
    auto group = std::find_if(groups_.begin(), groups_.end(), same);
    if (group == groups_.end()) group = groups_.insert(groups_.end(), {decays, lr_scale, {}});
    group->members.push_back(index);
    copies_.push_back(static_cast<double>(weights.copies(weight.spec())));
    exp_avg_.push_back(at::zeros_like(weight.parameter.master));
    exp_avg_sq_.push_back(at::zeros_like(weight.parameter.master));
  }
  updates_ = at::zeros({}, weights.all().front().parameter.master.options());
}

Tensor Optimizer::squared_norm_share() const {
  const Unrecorded guard;
  std::vector<Tensor> squares;
  for (size_t index = 0; index < copies_.size(); ++index) {
    const Tensor norm = at::linalg_vector_norm(weights_.all()[index].parameter.main_grad.reshape({-1}));
    squares.push_back(norm.to(at::kDouble).square().div(copies_[index]));
  }
  return at::stack(squares).sum();
}

void Optimizer::step(double lr, const Tensor& squared_norm) {
  const Unrecorded guard;
  const Tensor norm = squared_norm.sqrt();
  const Tensor skip = norm.isfinite().logical_not().to(at::kFloat);
  // Dividing by max(1, norm / clip) is clipping to the norm; 1e-6 as in torch.nn.utils.clip_grad_norm_.
  const Tensor divisor = settings_.clip > 0 ? norm.add(1e-6).div(settings_.clip).clamp_min(1.0).to(at::kFloat)
                                            : skip.new_ones({});
  updates_.add_(1.0 - skip);
  for (const Group& group : groups_) {
    std::vector<Tensor> masters, gradients, exp_avg, exp_avg_sq;
    for (const size_t index : group.members) {
      masters.push_back(weights_.all()[index].parameter.master);
      gradients.push_back(weights_.all()[index].parameter.main_grad);
      exp_avg.push_back(exp_avg_[index]);
      exp_avg_sq.push_back(exp_avg_sq_[index]);
    }
    const AdamW settings{.lr = lr * group.lr_scale,
                         .beta1 = settings_.betas[0],
                         .beta2 = settings_.betas[1],
                         .eps = settings_.eps,
                         .weight_decay = group.decays ? settings_.weight_decay : 0.0};
    adamw_step(settings, masters, gradients, exp_avg, exp_avg_sq, updates_, divisor, skip);
  }
  weights_.publish();
}

void Optimizer::zero_gradients() {
  for (Weights::GradientBuffer& buffer : weights_.gradients()) buffer.flat.zero_();
}

}  // namespace upcycle
