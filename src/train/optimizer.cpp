#include "train/optimizer.hpp"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "base/autograd.hpp"
#include "ops/adamw.hpp"

namespace upcycle {

Optimizer::Optimizer(Weights& weights, const OptimizerSection& settings, double router_lr_scale)
    : weights_(weights), settings_(settings) {
  weights.start_training();
  std::vector<double> shares;
  for (const Bucket& bucket : weights.buckets()) {
    exp_avg_.push_back(at::zeros_like(bucket.masters));
    exp_avg_sq_.push_back(at::zeros_like(bucket.masters));
    for (size_t i = 0; i < bucket.weights.size(); ++i) {
      const Range run = bucket.owned(i);
      if (run.size() == 0) continue;
      const ParameterSpec& spec = weights.all()[bucket.weights[i]].spec();
      const bool decays = spec.decays();
      const double lr_scale = spec.role == Role::router ? router_lr_scale : 1.0;
      const auto same = [&](const Group& group) { return group.decays == decays && group.lr_scale == lr_scale; };
      auto group = std::find_if(groups_.begin(), groups_.end(), same);
      if (group == groups_.end()) group = groups_.insert(groups_.end(), {decays, lr_scale, {}, {}, {}, {}});
      const auto owned = [&](const Tensor& flat) { return flat.narrow(0, run.begin - bucket.own.begin, run.size()); };
      group->masters.push_back(owned(bucket.masters));
      group->gradients.push_back(bucket.gradients.narrow(0, run.begin, run.size()));
      group->exp_avg.push_back(owned(exp_avg_.back()));
      group->exp_avg_sq.push_back(owned(exp_avg_sq_.back()));
      gradients_.push_back(group->gradients.back());
      shares.push_back(bucket.divided() ? 1.0 : 1.0 / static_cast<double>(bucket.place.holders));
    }
  }
  const at::TensorOptions options = weights.buckets().front().gradients.options();
  share_ = at::tensor(shares, at::kDouble).to(options.device());
  updates_ = at::zeros({}, options);
}

Tensor Optimizer::squared_norm_share() const {
  const Unrecorded guard;
  if (gradients_.empty()) return at::zeros({}, share_.options());
  return at::stack(at::_foreach_norm(gradients_)).to(at::kDouble).square().mul(share_).sum();
}

void Optimizer::step(double lr, const Tensor& squared_norm, const Tensor& wanted) {
  const Unrecorded guard;
  const Tensor norm = squared_norm.sqrt();
  Tensor bad = norm.isfinite().logical_not();
  if (wanted.defined()) bad = bad.logical_or(wanted.logical_not());
  const Tensor skip = bad.to(at::kFloat);
  // Dividing by max(1, norm / clip) is clipping to the norm; 1e-6 as in torch.nn.utils.clip_grad_norm_.
  const Tensor divisor = settings_.clip > 0 ? norm.add(1e-6).div(settings_.clip).clamp_min(1.0).to(at::kFloat)
                                            : skip.new_ones({});
  updates_.add_(1.0 - skip);
  for (const Group& group : groups_) {
    const AdamW settings{.lr = lr * group.lr_scale,
                         .beta1 = settings_.betas[0],
                         .beta2 = settings_.betas[1],
                         .eps = settings_.eps,
                         .weight_decay = group.decays ? settings_.weight_decay : 0.0};
    adamw_step(settings, group.masters, group.gradients, group.exp_avg, group.exp_avg_sq, updates_, divisor, skip);
  }
  weights_.publish();
}

void Optimizer::forget() {
  for (Tensor& moment : exp_avg_) moment.zero_();
  for (Tensor& moment : exp_avg_sq_) moment.zero_();
  updates_.zero_();
}

void Optimizer::zero_gradients() {
  for (Bucket& bucket : weights_.buckets()) bucket.gradients.zero_();
}

}  // namespace upcycle
