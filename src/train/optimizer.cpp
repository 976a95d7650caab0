#include "train/optimizer.hpp"

#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "base/trace_range.hpp"
#include "ops/sums_of_squares.hpp"

namespace upcycle {
namespace {

// Their ops add sums of rows; all others' write matrix products.
bool only_adds(const ParameterSpec& spec) { return spec.role == Role::norm || spec.role == Role::router; }

}  // namespace

Optimizer::Optimizer(Weights& weights, const OptimizerSection& settings, double router_lr_scale)
    : weights_(weights), settings_(settings) {
  weights.start_training();
  log::debug(text(weights.buckets().size(), " buckets of gradients, in backward's order:"));
  const bool flat = weights.buckets().front().gradients.is_cuda();   // a CPU sums weight by weight: in fp32, and so fewer at a time
  for (const Bucket& bucket : weights.buckets()) {
    exp_avg_.push_back(at::zeros_like(bucket.masters));
    exp_avg_sq_.push_back(at::zeros_like(bucket.masters));
    log::debug(text("  ", weights.all()[bucket.weights.front()].spec().name, " to ", weights.all()[bucket.weights.back()].spec().name, ": ", bucket.dtype,
                    ", ", bucket.size, " elements, ", bucket.own.size(), " of them updated here; ", bucket.place.holders, " ranks add theirs"));
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
    squared_.emplace_back();
    const auto sum = [&](int64_t begin, int64_t end, const Parameter* whole = nullptr) {
      if (begin < end) squared_.back().push_back({buffers_.back().gradients().narrow(0, begin, end - begin), share, whole});
    };
    int64_t summed = 0;   // in one go as far as it may be: what is between runs is zero
    for (size_t i = 0; i < bucket.weights.size(); ++i) {
      const auto [begin, end] = bucket.owned(i);
      if (begin == end) continue;
      const Weight& weight = weights.all()[bucket.weights[i]];
      const bool tells = bucket.place.holders == 1 && weight.spec().role == Role::expert;
      if (flat && !tells) continue;
      if (flat) sum(summed, begin - bucket.own.begin);
      summed = end - bucket.own.begin;
      sum(begin - bucket.own.begin, summed, tells ? &weight.parameter : nullptr);
    }
    if (flat) sum(summed, bucket.own.size());
    Range open;   // neighbours are zeroed together, with what lies between them
    const auto close = [&] {
      if (open.size() > 0) zeroed_.push_back(bucket.gradients.narrow(0, open.begin, open.size()));
      open = {};
    };
    for (size_t i = 0; i < bucket.weights.size(); ++i) {
      Weight& weight = weights.all()[bucket.weights[i]];
      if (only_adds(weight.spec())) {
        open = {open.size() > 0 ? open.begin : bucket.runs[i].begin, bucket.runs[i].end};
      } else {
        close();
        overwritten_.push_back(&weight.parameter);
      }
    }
    close();
  }
  updates_ = at::zeros({}, weights.buckets().front().gradients.options());
}

Tensor Optimizer::squared_norm_share(const BucketFunction& arrived) const {
  for (const Weight& weight : weights_.all()) {
    if (weight.parameter.outdated) throw std::logic_error(text("nothing was added to the gradient of ", weight.spec().name, " in this step"));
  }
  const Unrecorded guard;
  std::vector<Tensor> sums;
  for (size_t bucket = 0; bucket < squared_.size(); ++bucket) {
    if (arrived) arrived(bucket);
    std::vector<Tensor> read;
    std::vector<double> shares;
    for (const Squared& stretch : squared_[bucket]) {
      if (stretch.whole && stretch.whole->squares.defined()) {
        sums.push_back(stretch.whole->squares);
      } else {
        read.push_back(stretch.gradients), shares.push_back(stretch.share);
      }
    }
    if (!read.empty()) sums.push_back(sums_of_squares(read, shares));
  }
  return sums.empty() ? at::zeros({}, updates_.options().dtype(at::kDouble)) : at::cat(sums).sum();
}

void Optimizer::step(double lr, const Tensor& squared_norm, const Tensor& wanted, const BucketFunction& updated) {
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
  for (size_t index = buffers_.size(); index-- > 0;) {
    buffers_[index].step(settings, updates_, divisor, skip);
    if (updated) updated(index);
  }
}

void Optimizer::forget() {
  for (Tensor& moment : exp_avg_) moment.zero_();
  for (Tensor& moment : exp_avg_sq_) moment.zero_();
  updates_.zero_();
}

void Optimizer::zero_gradients() {
  const Unrecorded guard;
  for (Parameter* parameter : overwritten_) parameter->outdated = true;
  if (!zeroed_.empty()) at::_foreach_zero_(zeroed_);
}

}  // namespace upcycle
