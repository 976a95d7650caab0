#pragma once
#include "ops/parameter.hpp"

// Shapes: T rows (any leading dims), I inputs, O outputs.
namespace upcycle {

/// x [.., I] times matrix [I, O], in x's dtype. Where a CPU has no instructions for bf16, in fp32 and rounded once: LibTorch's own loop for
/// such CPUs is 5 to 40 times slower.
Tensor matrix_product(const Tensor& x, const Tensor& matrix_IO);
/// The same of x [T, I] into `out` [T, O].
void matrix_product_into(Tensor out_TO, const Tensor& x_TI, const Tensor& matrix_IO);

/// y = x W^T, in the dtype of `weight.value` [O, I], whatever that of `x` [..., I]; x is kept as it came. Backward adds dy^T x into
/// weight.main_grad. With `made`, y is that, whoever computed it.
Tensor linear(const Tensor& x, Parameter& weight, const Tensor& made = {});

/// main_grad [O, I] (fp32) += dy^T x, for dy [T, O] and x [T, I]; products of bf16 are summed and added in fp32. `overwrite`: = dy^T x,
/// whatever was there.
void add_weight_gradient(Tensor main_grad_OI, const Tensor& dy_TO, const Tensor& x_TI, bool overwrite = false);

}  // namespace upcycle
