#pragma once
#include "ops/parameter.hpp"

// Shapes: D width; any leading dims.
namespace upcycle {

/// Root mean square norm over the last dim (Zhang & Sennrich, 1910.07467): weight * (x / sqrt(mean(x^2) + eps)).
/// Statistics in fp32; the normalised x is rounded to x's dtype before the weight, as Hugging Face's Qwen3 does. Backward keeps x and
/// one number a row. CUDA: a kernel each way where rows are whole vectors of 16 bytes; else written out.
Tensor rms_norm(const Tensor& x_D, Parameter& weight_D, double eps);

/// A stream of rows that goes on beside its own norm.
struct Normed {
  Tensor x_D;
  Tensor norm_D;
};

/// rms_norm, for an x that is used further: who goes on with the x that comes back has both of its gradients added in the norm's backward.
Normed rms_norm_beside(const Tensor& x_D, Parameter& weight_D, double eps);

/// The sum x + branch (two tensors of one dtype, rounded to it) and rms_norm of it, in one pass each way.
Normed add_rms_norm(const Tensor& x_D, const Tensor& branch_D, Parameter& weight_D, double eps);

/// The same as add_rms_norm, or with an undefined branch as rms_norm_beside, in ATen's operations: what CPUs do, and what the kernels are
/// tested against.
Normed rms_norm_written_out(const Tensor& x_D, const Tensor& branch_D, Parameter& weight_D, double eps);

/// 1 / sqrt(mean(x^2) + eps), fp32 [.., 1].
Tensor inverse_rms(const Tensor& x_D, double eps);
/// The written-out backward, not recorded: adds into weight.main_grad (and doesn't call it ready) and returns x's gradient, in fp32.
Tensor rms_norm_backward(const Tensor& dy_D, const Tensor& x_D, const Tensor& inverse_rms, Parameter& weight_D);

}  // namespace upcycle
