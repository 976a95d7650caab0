#pragma once
#include "ops/parameter.hpp"

// Shapes: ... any leading dims, D width.
namespace upcycle {

/// Root mean square norm over the last dim (Zhang & Sennrich, 1910.07467): weight * (x / sqrt(mean(x^2) + eps)).
/// Statistics in fp32; the normalised x is rounded to x's dtype before the weight, as Hugging Face's Qwen3 does.
Tensor rms_norm(const Tensor& x_D, Parameter& weight_D, double eps);

}  // namespace upcycle
