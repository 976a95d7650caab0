#include "ops/swiglu.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/swiglu.hpp"

namespace upcycle {
namespace {

bool kernel_takes(const Tensor& gate_up) {
  return gate_up.is_cuda() && (gate_up.scalar_type() == at::kBFloat16 || gate_up.scalar_type() == at::kFloat);
}

const float* weights_of(const Tensor& weight) { return weight.defined() ? weight.const_data_ptr<float>() : nullptr; }

Tensor product_by_kernel(const Tensor& gate_up, const Tensor& weight) {
  auto sizes = gate_up.sizes().vec();
  sizes.back() /= 2;
  const Tensor product = at::empty(sizes, gate_up.options());
  if (product.numel() == 0) return product;
  cuda::swiglu({gate_up.const_data_ptr(), weights_of(weight), product.mutable_data_ptr(), product.numel() / sizes.back(), sizes.back(),
                gate_up.scalar_type() == at::kBFloat16},
               device::current_stream(gate_up.device()));
  return product;
}

Gradients gradients_by_kernel(const Tensor& gate_up, const Tensor& weight, const Tensor& d) {
  const Tensor d_product = d.contiguous(), d_gate_up = at::empty_like(gate_up), d_weight = weight.defined() ? at::empty_like(weight) : Tensor();
  const int64_t width = d_product.size(-1);
  if (d_product.numel() > 0) {
    cuda::swiglu_backward({gate_up.const_data_ptr(), weights_of(weight), d_product.const_data_ptr(), d_gate_up.mutable_data_ptr(),
                           d_weight.defined() ? d_weight.mutable_data_ptr<float>() : nullptr, d_product.numel() / width, width,
                           gate_up.scalar_type() == at::kBFloat16},
                          device::current_stream(gate_up.device()));
  }
  return {d_gate_up, d_weight};
}

Tensor half(const Tensor& gate_up, int which) {
  const int64_t width = gate_up.size(-1) / 2;
  return gate_up.narrow(-1, which * width, width);
}

Tensor product_written_out(const Tensor& gate_up, const Tensor& weight) {
  const Tensor product = at::silu(half(gate_up, 0)).mul_(half(gate_up, 1));
  return weight.defined() ? product.mul_(weight) : product;
}

// Beside the result one more tensor of d's size at most, and only where there are weights.
Gradients gradients_written_out(const Tensor& gate_up, const Tensor& weight, const Tensor& d) {
  const Tensor gate = half(gate_up, 0), up = half(gate_up, 1), d_gate_up = at::empty_like(gate_up);
  Tensor d_gate = half(d_gate_up, 0), d_up = half(d_gate_up, 1), d_weight;
  at::silu_out(d_up, gate).mul_(d);
  if (weight.defined()) d_weight = (d_up * up).sum(-1, /*keepdim=*/true, at::kFloat);
  at::mul_out(d_gate, d, up);
  at::silu_backward_out(d_gate, d_gate, gate);
  if (weight.defined()) d_gate.mul_(weight), d_up.mul_(weight);
  return {d_gate_up, d_weight};
}

Tensor weighed(const Tensor& gate_up, const Tensor& weight, bool kernel) {
  const Tensor x = kernel ? gate_up.detach().contiguous() : gate_up.detach();
  const Tensor w = weight.defined() && kernel ? weight.detach().contiguous() : weight.defined() ? weight.detach() : Tensor();
  Tensor y;
  {
    const Unrecorded guard;
    y = kernel ? product_by_kernel(x, w) : product_written_out(x, w);
  }
  auto backward = [x, w, kernel](const std::vector<Tensor>& d) -> Gradients {
    Gradients gradients = kernel ? gradients_by_kernel(x, w, d[0]) : gradients_written_out(x, w, d[0]);
    if (!w.defined()) gradients.pop_back();
    return gradients;
  };
  return record(y, w.defined() ? std::vector<Tensor>{gate_up, weight} : std::vector<Tensor>{gate_up}, backward);
}

}  // namespace

Tensor swiglu(const Tensor& gate_up) { return weighed(gate_up, {}, kernel_takes(gate_up)); }

Tensor swiglu(const Tensor& gate_up, const Tensor& weight) { return weighed(gate_up, weight, kernel_takes(gate_up)); }

Tensor swiglu_written_out(const Tensor& gate_up, const Tensor& weight) { return weighed(gate_up, weight, false); }

}  // namespace upcycle
