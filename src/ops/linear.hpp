#pragma once
#include "ops/parameter.hpp"

// Shapes: T rows (any leading dims), I inputs, O outputs.
namespace upcycle {

/// y = x W^T, in the dtype of `weight.value` [O, I], whatever that of `x` [..., I]; x is kept as it came. Backward adds dy^T x into
/// weight.main_grad.
Tensor linear(const Tensor& x, Parameter& weight);

/// main_grad [O, I] (fp32) += dy^T x, for dy [T, O] and x [T, I]; products of bf16 are summed and added in fp32.
void add_weight_gradient(Tensor main_grad_OI, const Tensor& dy_TO, const Tensor& x_TI);

}  // namespace upcycle
