#include "ops/adamw.hpp"

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <stdexcept>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/adamw.hpp"

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

AdamWBuffer::AdamWBuffer(Tensor masters, Tensor gradients, Tensor exp_avg, Tensor exp_avg_sq, Tensor values, std::vector<AdamWRun> runs)
    : masters_(std::move(masters)), gradients_(std::move(gradients)), exp_avg_(std::move(exp_avg)), exp_avg_sq_(std::move(exp_avg_sq)),
      values_(std::move(values)), runs_(std::move(runs)) {
  for (const Tensor* x : {&masters_, &gradients_, &exp_avg_, &exp_avg_sq_, &values_}) {
    const bool optional = x == &values_;
    if (optional && !x->defined()) continue;
    if (x->dim() != 1 || x->numel() != masters_.numel() || !x->is_contiguous() || x->device() != masters_.device() ||
        (!optional && x->scalar_type() != at::kFloat)) {
      throw std::logic_error("what AdamW moves together has one size, in fp32");
    }
  }
  std::vector<double> table = {0.0, 0.0, 0.0};   // what is before the first run is zero
  for (const AdamWRun& run : runs_) {
    if (run.begin % 4 != 0 || run.end < run.begin || run.end > masters_.numel()) throw std::logic_error("a run of weights begins at a multiple of 4 elements");
    const double decays = run.decays ? 1.0 : 0.0;
    if (table[table.size() - 2] == run.lr_scale && table.back() == decays) continue;
    table.insert(table.end(), {static_cast<double>(run.begin), run.lr_scale, decays});
  }
  if (masters_.is_cuda()) stretches_ = at::tensor(table, at::kDouble).view({-1, 3}).to(masters_.device());
}

void AdamWBuffer::step_written_out(const AdamW& settings, const Tensor& step, const Tensor& gradient_divisor, const Tensor& skip) const {
  const Unrecorded guard;
  std::vector<AdamWRun> left = runs_;
  while (!left.empty()) {   // all runs that are updated alike in one call
    const AdamWRun like = left.front();
    const auto others = std::stable_partition(left.begin(), left.end(), [&](const AdamWRun& run) { return run.lr_scale == like.lr_scale && run.decays == like.decays; });
    std::vector<Tensor> masters, gradients, exp_avg, exp_avg_sq;
    for (auto run = left.begin(); run != others; ++run) {
      const auto of = [&](const Tensor& flat) { return flat.narrow(0, run->begin, run->end - run->begin); };
      masters.push_back(of(masters_)), gradients.push_back(of(gradients_)), exp_avg.push_back(of(exp_avg_)), exp_avg_sq.push_back(of(exp_avg_sq_));
    }
    AdamW own = settings;
    own.lr *= like.lr_scale;
    if (!like.decays) own.weight_decay = 0.0;
    adamw_step(own, masters, gradients, exp_avg, exp_avg_sq, step, gradient_divisor, skip);
    left.erase(left.begin(), others);
  }
  if (values_.defined()) values_.copy_(masters_);
}

void AdamWBuffer::step(const AdamW& settings, const Tensor& step, const Tensor& gradient_divisor, const Tensor& skip) const {
  const bool kernel_takes = masters_.is_cuda() && (!values_.defined() || values_.scalar_type() == at::kBFloat16);
  if (!kernel_takes) return step_written_out(settings, step, gradient_divisor, skip);
  const auto scalar = [&](const Tensor& x) {
    if (x.numel() != 1 || x.device() != masters_.device()) throw std::logic_error("what decides over a step is a scalar on its device");
    return x.const_data_ptr<float>();
  };
  cuda::AdamW p{};
  p.masters = masters_.mutable_data_ptr<float>(), p.gradients = gradients_.const_data_ptr<float>();
  p.exp_avg = exp_avg_.mutable_data_ptr<float>(), p.exp_avg_sq = exp_avg_sq_.mutable_data_ptr<float>();
  p.values = values_.defined() ? values_.mutable_data_ptr() : nullptr;
  p.size = masters_.numel();
  p.stretches = stretches_.const_data_ptr<double>(), p.num_stretches = static_cast<int>(stretches_.size(0));
  p.lr = settings.lr, p.beta1 = settings.beta1, p.beta2 = settings.beta2, p.eps = settings.eps, p.weight_decay = settings.weight_decay;
  p.step = scalar(step), p.divisor = scalar(gradient_divisor), p.skip = scalar(skip);
  cuda::adamw(p, device::current_stream(masters_.device()));
}

}  // namespace upcycle
