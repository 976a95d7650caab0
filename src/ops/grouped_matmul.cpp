#include "ops/grouped_matmul.hpp"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>

#include <functional>

#include "base/autograd.hpp"
#include "ops/linear.hpp"

namespace upcycle {
namespace {

// The kernel wants rows of whole 16 bytes, and some, and knows bf16; everything else goes expert by expert.
bool kernel_takes(const Tensor& x, const Parameter& weight) {
  const int64_t lanes = 16 / x.element_size();
  return x.is_cuda() && x.size(0) > 0 && x.scalar_type() == at::kBFloat16 && weight.value.size(1) % lanes == 0 &&
         weight.value.size(2) % lanes == 0;
}

void for_each_expert(const Tensor& end_E, const std::function<void(int64_t expert, int64_t begin, int64_t rows)>& visit) {
  const Tensor ends = end_E.cpu();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  for (int64_t expert = 0, begin = 0; expert < ends.size(0); begin = end[expert++]) visit(expert, begin, end[expert] - begin);
}

// [R, in] x [E, in, out] -> [R, out]
Tensor multiply(const Tensor& x, const Tensor& matrices, const Tensor& end_E, bool kernel) {
  if (kernel) return at::_grouped_mm(x, matrices, end_E);
  Tensor y = at::empty({x.size(0), matrices.size(2)}, x.options());
  for_each_expert(end_E, [&](int64_t expert, int64_t begin, int64_t rows) {
    if (rows > 0) matrix_product_into(y.narrow(0, begin, rows), x.narrow(0, begin, rows), matrices[expert]);
  });
  return y;
}

void add_weight_gradients(Tensor main_grad, const Tensor& dy, const Tensor& x, const Tensor& end_E, bool kernel) {
  if (kernel) {
    main_grad.add_(at::_grouped_mm(dy.t(), x, end_E));  // the kernel's output is bf16; the sum over micro-batches is fp32
    return;
  }
  for_each_expert(end_E, [&](int64_t expert, int64_t begin, int64_t rows) {
    if (rows > 0) add_weight_gradient(main_grad[expert], dy.narrow(0, begin, rows), x.narrow(0, begin, rows));
  });
}

}  // namespace

Tensor grouped_matmul(const Tensor& x, Parameter& weight, const Tensor& end_E) {
  const bool kernel = kernel_takes(x, weight);
  Tensor y;
  {
    const Unrecorded guard;
    y = multiply(x, weight.arrived().transpose(1, 2), end_E, kernel);
  }
  return record(y, {x}, [x = x.detach(), end_E, kernel, &weight](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor dy_RO = dy[0].contiguous();
    add_weight_gradients(weight.main_grad, dy_RO, x, end_E, kernel);
    weight.ready();
    return {multiply(dy_RO, weight.value, end_E, kernel)};
  });
}

}  // namespace upcycle
