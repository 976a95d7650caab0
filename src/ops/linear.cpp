#include "ops/linear.hpp"

#include <ATen/cpu/Utils.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "base/autograd.hpp"
#include "base/postponed.hpp"

namespace upcycle {
namespace {

// oneDNN multiplies bf16 from AVX-512 on; below that LibTorch converts number by number.
bool lacks_units(const Tensor& x) {
  static const bool native = at::cpu::is_avx512_vnni_supported();
  return x.is_cpu() && x.scalar_type() == at::kBFloat16 && !native;
}

}  // namespace

Tensor matrix_product(const Tensor& x, const Tensor& matrix_IO) {
  if (!lacks_units(x)) return at::matmul(x, matrix_IO);
  return at::matmul(x.to(at::kFloat), matrix_IO.to(at::kFloat)).to(x.scalar_type());
}

void matrix_product_into(Tensor out_TO, const Tensor& x_TI, const Tensor& matrix_IO) {
  if (lacks_units(x_TI)) {
    out_TO.copy_(at::mm(x_TI.to(at::kFloat), matrix_IO.to(at::kFloat)));
  } else {
    at::mm_out(out_TO, x_TI, matrix_IO);
  }
}

void add_weight_gradient(Tensor main_grad_OI, const Tensor& dy_TO, const Tensor& x_TI, bool overwrite) {
  const int beta = overwrite ? 0 : 1;   // 0: what was there is not read, whatever it is
  if (x_TI.size(0) == 0) {
    if (overwrite) main_grad_OI.zero_();
  } else if (x_TI.scalar_type() == at::kFloat) {
    main_grad_OI.addmm_(dy_TO.t(), x_TI, beta);
  } else if (x_TI.is_cuda()) {
    at::addmm_out(main_grad_OI, main_grad_OI, dy_TO.t(), x_TI, at::kFloat, beta);  // in cuBLAS's epilogue: bf16 in, fp32 out
  } else {
    main_grad_OI.addmm_(dy_TO.to(at::kFloat).t(), x_TI.to(at::kFloat), beta);
  }
}

Tensor linear(const Tensor& x, Parameter& weight, const Tensor& made) {
  Tensor y = made;
  if (!y.defined()) {
    const Unrecorded guard;
    const Tensor& value = weight.arrived();
    y = matrix_product(x.to(value.scalar_type()), value.t());
  }
  return record(y, {x}, [x = x.detach(), &weight](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor dy_TO = dy[0].reshape({-1, dy[0].size(-1)});
    const auto weight_gradient = [dy_TO, x, &weight] {
      add_weight_gradient(weight.main_grad, dy_TO, x.reshape({-1, x.size(-1)}).to(dy_TO.scalar_type()), weight.overwrites());
      weight.ready();
    };
    return {Postponed::product_backward(weight_gradient, [&] { return matrix_product(dy[0], weight.value).to(x.scalar_type()); })};
  });
}

}  // namespace upcycle
