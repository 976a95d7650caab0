#include "train/optimizer.hpp"

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <utility>

#include "base/autograd.hpp"
#include "base/trace_range.hpp"
#include "ops/sum_of_squares.hpp"

namespace upcycle {

Optimizer::Optimizer(Weights& weights, const OptimizerSection& settings, double router_lr_scale)
    : weights_(weights), settings_(settings) {
  weights.start_training();
  const bool flat = weights.buckets().front().gradients.is_cuda();   // a CPU sums weight by weight: in fp32, and so fewer at a time
  for (const Bucket& bucket : weights.buckets()) {
    exp_avg_.push_back(at::zeros_like(bucket.masters));
    exp_avg_sq_.push_back(at::zeros_like(bucket.masters));
    const auto own_of = [&](const Tensor& whole) { return whole.narrow(0, bucket.own.begin, bucket.own.size()); };
    std::vector<AdamWRun> runs;
    for (size_t i = 0; i < bucket.weights.size(); ++i) {
      const auto owned = bucket.owned(i);
      if (owned.size() == 0) continue;
      const ParameterSpec& spec = weights.all()[bucket.weights[i]].spec();
      runs.push_back({owned.begin - bucket.own.begin, owned.end - bucket.own.begin, spec.role == Role::router ? router_lr_scale : 1.0, spec.decays()});
    }
    buffers_.emplace_back(bucket.masters, own_of(bucket.gradients), exp_avg_.back(), exp_avg_sq_.back(),
                          bucket.dtype == at::kFloat ? Tensor() : own_of(bucket.values), runs);
    const double share = bucket.divided() ? 1.0 : 1.0 / static_cast<double>(bucket.place.holders);
    const auto sum = [&](const Tensor& gradients) { squared_.push_back(gradients), shares_.push_back(share); };
    if (flat) {
      sum(buffers_.back().gradients());   // what is between runs is zero
    } else {
      for (const AdamWRun& run : runs) sum(buffers_.back().gradients().narrow(0, run.begin, run.end - run.begin));
    }
  }
  updates_ = at::zeros({}, weights.buckets().front().gradients.options());
}

Tensor Optimizer::squared_norm_share() const {
  if (squared_.empty()) return at::zeros({}, updates_.options().dtype(at::kDouble));
  return sum_of_squares(squared_, shares_);
}

void Optimizer::step(double lr, const Tensor& squared_norm, const Tensor& wanted) {
  const TraceRange range("optimizer");
  const Unrecorded guard;
  const Tensor norm = squared_norm.sqrt();
  Tensor bad = norm.isfinite().logical_not();
  if (wanted.defined()) bad = bad.logical_or(wanted.logical_not());
  const Tensor skip = bad.to(at::kFloat);
  // Dividing by max(1, norm / clip) is clipping to the norm; 1e-6 as in torch.nn.utils.clip_grad_norm_.
  const Tensor divisor = settings_.clip > 0 ? norm.add(1e-6).div(settings_.clip).clamp_min(1.0).to(at::kFloat)
                                            : skip.new_ones({});
  updates_.add_(1.0 - skip);
  const AdamW settings{.lr = lr, .beta1 = settings_.betas[0], .beta2 = settings_.betas[1], .eps = settings_.eps,
                       .weight_decay = settings_.weight_decay};
  for (const AdamWBuffer& buffer : buffers_) buffer.step(settings, updates_, divisor, skip);
  stepped_ = true;
}

void Optimizer::forget() {
  for (Tensor& moment : exp_avg_) moment.zero_();
  for (Tensor& moment : exp_avg_sq_) moment.zero_();
  updates_.zero_();
}

void Optimizer::zero_gradients() {
  const Unrecorded guard;
  const bool own_are_zero = std::exchange(stepped_, false);   // where the step does so; of others' parts of a bucket nobody knows
  for (size_t index = 0; index < buffers_.size(); ++index) {
    const Bucket& bucket = weights_.buckets()[index];
    if (!own_are_zero || !buffers_[index].zeroes_gradients()) {
      bucket.gradients.zero_();
    } else if (bucket.divided()) {
      bucket.gradients.narrow(0, 0, bucket.own.begin).zero_();
      bucket.gradients.narrow(0, bucket.own.end, bucket.size - bucket.own.end).zero_();
    }
  }
}

}  // namespace upcycle
