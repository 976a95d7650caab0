#include "ops/rms_norm.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/rms_norm.hpp"
#include "ops/kernel.hpp"

namespace upcycle {
namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }
void* numbers(const Tensor& x) { return x.defined() ? x.data_ptr() : nullptr; }

bool kernel_takes(const Tensor& x, const Tensor& branch, const Tensor& weight) {
  const bool alike = weight.scalar_type() == x.scalar_type() && (!branch.defined() || branch.scalar_type() == x.scalar_type());
  const bool vectors = x.is_cuda() && (is_bf16(x) || x.scalar_type() == at::kFloat) && cuda::rms_norm_takes(x.size(-1), is_bf16(x));
  return alike && vectors && in_vectors(weight);
}

struct Forward {
  Tensor sum;     // x itself without a branch
  Tensor y;
  Tensor scale;   // [..., 1]
};

Forward by_kernel(const Tensor& x, const Tensor& branch, const Tensor& weight, double eps) {
  const Tensor x_rows = as_vectors(x), branch_rows = branch.defined() ? as_vectors(branch) : branch;
  std::vector<int64_t> one = x.sizes().vec();
  one.back() = 1;
  Forward f = {branch.defined() ? at::empty(x.sizes(), x.options()) : x, at::empty(x.sizes(), x.options()),
               at::empty(one, x.options().dtype(at::kFloat))};
  cuda::rms_norm({.x = numbers(x_rows), .branch = numbers(branch_rows), .weight = numbers(weight),
                  .sum = branch.defined() ? numbers(f.sum) : nullptr, .y = numbers(f.y), .scale = f.scale.mutable_data_ptr<float>(),
                  .rows = f.scale.numel(), .width = static_cast<int>(x.size(-1)), .eps = static_cast<float>(eps), .bf16 = is_bf16(x)},
                 device::current_stream(x.device()));
  return f;
}

Forward written_out(const Tensor& x, const Tensor& branch, const Tensor& weight, double eps) {
  Forward f;
  f.sum = branch.defined() ? x + branch : x;
  f.scale = inverse_rms(f.sum, eps);
  f.y = (f.sum.to(at::kFloat) * f.scale).to(x.scalar_type()).mul_(weight);
  return f;
}

// Of the stream's gradient, which may be undefined, and the norm's.
Tensor backward_by_kernel(const Tensor& d_stream, const Tensor& dy, const Tensor& x, const Tensor& scale, Parameter& weight) {
  const Tensor x_rows = as_vectors(x), dy_rows = as_vectors(dy), stream_rows = d_stream.defined() ? as_vectors(d_stream) : d_stream;
  const int64_t rows = scale.numel(), width = x.size(-1);
  const Tensor dx = at::empty(x.sizes(), x.options());
  const Tensor partial = at::empty({cuda::rms_norm_partials(rows, width, is_bf16(x)), width}, scale.options());
  cuda::rms_norm_backward({.x = numbers(x_rows), .scale = scale.const_data_ptr<float>(), .weight = numbers(weight.value),
                           .dy = numbers(dy_rows), .stream = numbers(stream_rows), .dx = numbers(dx),
                           .partial = partial.mutable_data_ptr<float>(), .weight_sum = weight.sums().mutable_data_ptr<float>(),
                           .rows = rows, .width = static_cast<int>(width), .bf16 = is_bf16(x)},
                          device::current_stream(x.device()));
  return dx;
}

Tensor backward_written_out(const Tensor& d_stream, const Tensor& dy, const Tensor& x, const Tensor& scale, Parameter& weight) {
  const Tensor dx = rms_norm_backward(dy, x, scale, weight);
  return (d_stream.defined() ? dx.add_(d_stream) : dx).to(x.scalar_type());
}

Normed normed(const Tensor& x, const Tensor& branch, Parameter& weight, double eps, bool kernel) {
  Forward f;
  {
    const Unrecorded guard;
    f = (kernel ? by_kernel : written_out)(x, branch, weight.arrived(), eps);
  }
  const bool adds = branch.defined();
  const auto backward = [x = f.sum.detach(), scale = f.scale, &weight, kernel, adds](const std::vector<Tensor>& d) -> Gradients {
    const Tensor dy = d[1].defined() ? d[1] : at::zeros(x.sizes(), x.options());
    const Tensor dx = (kernel ? backward_by_kernel : backward_written_out)(d[0], dy, x, scale, weight);
    weight.ready();
    return adds ? Gradients{dx, dx} : Gradients{dx};
  };
  const std::vector<Tensor> both = record({f.sum, f.y}, adds ? std::vector<Tensor>{x, branch} : std::vector<Tensor>{x}, backward);
  return {both[0], both[1]};
}

}  // namespace

Tensor rms_norm(const Tensor& x, Parameter& weight, double eps) { return rms_norm_beside(x, weight, eps).norm_D; }

Normed rms_norm_beside(const Tensor& x, Parameter& weight, double eps) {
  return normed(x, {}, weight, eps, kernel_takes(x, {}, weight.value));
}

Normed add_rms_norm(const Tensor& x, const Tensor& branch, Parameter& weight, double eps) {
  return normed(x, branch, weight, eps, kernel_takes(x, branch, weight.value));
}

Normed rms_norm_written_out(const Tensor& x, const Tensor& branch, Parameter& weight, double eps) {
  return normed(x, branch, weight, eps, false);
}

Tensor inverse_rms(const Tensor& x, double eps) { return x.to(at::kFloat).square().mean(-1, true).add_(eps).rsqrt_(); }

Tensor rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& scale, Parameter& weight) {
  const Tensor dy32 = dy.to(at::kFloat), unit = x.to(at::kFloat) * scale;
  weight.sums().add_((dy32 * unit).reshape({-1, x.size(-1)}).sum(0));
  // d/dx of x * scale(x): the part of the gradient along x itself is taken out.
  const Tensor d_unit = dy32 * weight.value.to(at::kFloat);
  const Tensor along = (d_unit * unit).mean(-1, true);
  return d_unit.sub_(unit * along).mul_(scale);
}

}  // namespace upcycle
