#include "ops/linear.hpp"

#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "base/autograd.hpp"

namespace upcycle {

void add_weight_gradient(Tensor main_grad_OI, const Tensor& dy_TO, const Tensor& x_TI) {
  if (x_TI.scalar_type() == at::kFloat) {
    main_grad_OI.addmm_(dy_TO.t(), x_TI);
  } else if (x_TI.is_cuda()) {
    main_grad_OI.add_(at::mm(dy_TO.t(), x_TI, at::kFloat));  // bf16 in, fp32 out: the sum is never rounded to bf16
  } else {
    main_grad_OI.addmm_(dy_TO.to(at::kFloat).t(), x_TI.to(at::kFloat));
  }
}

Tensor linear(const Tensor& x, Parameter& weight) {
  Tensor y;
  {
    const Unrecorded guard;
    const Tensor& value = weight.arrived();
    y = at::linear(x.to(value.scalar_type()), value);
  }
  return record(y, {x}, [x = x.detach(), &weight](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor dy_TO = dy[0].reshape({-1, dy[0].size(-1)});
    add_weight_gradient(weight.main_grad, dy_TO, x.reshape({-1, x.size(-1)}).to(dy_TO.scalar_type()));
    weight.ready();
    return {at::matmul(dy[0], weight.value).to(x.scalar_type())};
  });
}

}  // namespace upcycle
