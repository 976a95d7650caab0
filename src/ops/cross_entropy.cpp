#include "ops/cross_entropy.hpp"

#include <ATen/ops/empty.h>

#include <stdexcept>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/cross_entropy.hpp"

namespace upcycle {
namespace {

bool by_kernel(const Tensor& logits) {
  return logits.is_cuda() && (logits.scalar_type() == at::kBFloat16 || logits.scalar_type() == at::kFloat);
}

float* floats(const Tensor& x_T) { return x_T.defined() ? x_T.mutable_data_ptr<float>() : nullptr; }

cuda::CrossEntropy described(const Tensor& logits_TV, const Tensor& labels_T, const Tensor& weight_T, int64_t first) {
  const int64_t rows = logits_TV.size(0);
  if (logits_TV.dim() != 2 || (logits_TV.size(1) > 1 && logits_TV.stride(1) != 1)) throw std::logic_error("logits are rows of numbers side by side");
  if (labels_T.numel() != rows || !labels_T.is_contiguous() || labels_T.device() != logits_TV.device()) throw std::logic_error("each row of logits has a label");
  if (weight_T.defined() && (weight_T.numel() != rows || !weight_T.is_contiguous() || weight_T.device() != logits_TV.device())) {
    throw std::logic_error("each row of logits has a weight");
  }
  cuda::CrossEntropy p{};
  p.logits = logits_TV.mutable_data_ptr();
  p.bf16 = logits_TV.scalar_type() == at::kBFloat16;
  p.rows = rows, p.columns = logits_TV.size(1), p.stride = logits_TV.stride(0);
  p.labels = labels_T.const_data_ptr<int64_t>(), p.first = first;
  p.weights = floats(weight_T);
  return p;
}

/// The labels' columns, and 1 where they are among these.
struct Found {
  Tensor column_T1, here_T1;
  Found(const Tensor& labels_T, int64_t first, int64_t columns) {
    column_T1 = labels_T.unsqueeze(1) - first;
    here_T1 = column_T1.ge(0).logical_and(column_T1.lt(columns)).to(at::kFloat);
    column_T1.clamp_(0, columns - 1);
  }
};

}  // namespace

SoftmaxSums softmax_sums_written_out(const Tensor& logits_TV, const Tensor& labels_T, int64_t first) {
  const Unrecorded guard;
  const Found found(labels_T, first, logits_TV.size(1));
  const Tensor logits32 = logits_TV.to(at::kFloat), largest_T1 = logits32.amax(1, /*keepdim=*/true);
  return {largest_T1.squeeze(1), (logits32 - largest_T1).exp_().sum(1), logits32.gather(1, found.column_T1).masked_fill_(found.here_T1.eq(0.0), 0.0).squeeze(1)};
}

SoftmaxSums softmax_sums(const Tensor& logits_TV, const Tensor& labels_T, int64_t first) {
  if (!by_kernel(logits_TV)) return softmax_sums_written_out(logits_TV, labels_T, first);
  const auto fresh = [&] { return at::empty({logits_TV.size(0)}, logits_TV.options().dtype(at::kFloat)); };
  const SoftmaxSums sums{fresh(), fresh(), fresh()};
  cuda::CrossEntropy p = described(logits_TV, labels_T, {}, first);
  p.largest = floats(sums.largest_T), p.sums = floats(sums.sum_T), p.label_logits = floats(sums.label_T);
  cuda::softmax_sums(p, device::current_stream(logits_TV.device()));
  return sums;
}

Tensor weighted_losses(const SoftmaxSums& whole, const Tensor& weight_T) {
  const Unrecorded guard;
  const Tensor loss_T = whole.sum_T.log() + whole.largest_T - whole.label_T;
  return (loss_T * weight_T).masked_fill_(weight_T.eq(0.0), 0.0);
}

void cross_entropy_gradient_written_out(Tensor logits_TV, const Tensor& labels_T, const Tensor& weight_T, const SoftmaxSums& whole, int64_t first) {
  const Unrecorded guard;
  const Found found(labels_T, first, logits_TV.size(1));
  const Tensor weight_T1 = weight_T.unsqueeze(1);
  Tensor gradient = (logits_TV.to(at::kFloat) - whole.largest_T.unsqueeze(1)).exp_().mul_(weight_T1 / whole.sum_T.unsqueeze(1));
  gradient.scatter_add_(1, found.column_T1, -found.here_T1 * weight_T1);
  logits_TV.copy_(gradient.masked_fill_(weight_T1.eq(0.0), 0.0));
}

void cross_entropy_gradient(Tensor logits_TV, const Tensor& labels_T, const Tensor& weight_T, const SoftmaxSums& whole, int64_t first) {
  if (!by_kernel(logits_TV)) return cross_entropy_gradient_written_out(logits_TV, labels_T, weight_T, whole, first);
  const Tensor largest_T = whole.largest_T.contiguous(), sum_T = whole.sum_T.contiguous();
  cuda::CrossEntropy p = described(logits_TV, labels_T, weight_T, first);
  p.largest = floats(largest_T), p.sums = floats(sum_T);
  cuda::cross_entropy_gradient(p, device::current_stream(logits_TV.device()));
}

Tensor cross_entropy(Tensor logits_TV, const Tensor& labels_T, const Tensor& weight_T) {
  if (!by_kernel(logits_TV)) {
    const SoftmaxSums sums = softmax_sums_written_out(logits_TV, labels_T);
    cross_entropy_gradient_written_out(logits_TV, labels_T, weight_T, sums);
    return weighted_losses(sums, weight_T);
  }
  const Tensor loss_T = at::empty({logits_TV.size(0)}, logits_TV.options().dtype(at::kFloat));
  cuda::CrossEntropy p = described(logits_TV, labels_T, weight_T, 0);
  p.losses = floats(loss_T);
  cuda::cross_entropy(p, device::current_stream(logits_TV.device()));
  return loss_T;
}

}  // namespace upcycle
