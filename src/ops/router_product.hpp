#pragma once
#include "ops/parameter.hpp"

// Shapes: T rows (any leading dims), D width, E outputs, F: E rounded up to whole tiles.
namespace upcycle {

/// y = x W^T in fp32, for a weight [E, D] in fp32: what linear() gives. bf16 activations on a GPU are read as they are, not as a copy in
/// fp32, and multiplied on the units for bf16; each number of the weight, and of dy, is the sum of three of bf16. As accurate as the
/// product in fp32; the gradient of x is rounded once. Backward adds dy^T x into weight.main_grad, always in the same order.
/// All else (CPUs, activations in fp32, widths that are not whole 16 bytes) goes through linear().
Tensor router_product(const Tensor& x, Parameter& weight);

}  // namespace upcycle
