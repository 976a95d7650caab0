#pragma once
#include "ops/parameter.hpp"

// Shapes: R rows sorted by expert, E experts, I inputs, O outputs.
namespace upcycle {

/// y_RO: rows of expert e times weight[e]^T. `x` [R, I]; `weight.value` [E, O, I], same dtype; `end_E` int32 [E] on x's device:
/// expert e owns rows end[e-1] .. end[e]; end[E-1] == R. Backward adds into weight.main_grad.
/// CUDA, bf16, I and O multiples of 8: ATen's grouped kernel with device offsets, no host synchronisation. Else one product per
/// expert, for which the host waits for `end_E`.
Tensor grouped_matmul(const Tensor& x_RI, Parameter& weight_EOI, const Tensor& end_E);

}  // namespace upcycle
