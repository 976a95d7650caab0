#pragma once
#include "base/tensor.hpp"

// Shapes: R rows (any leading dims), F width of the feed-forward.
namespace upcycle {

/// silu(gate) * up (Shazeer, 2002.05202) for gate_up [..., 2F] with the gate first; the result is [..., F].
Tensor swiglu(const Tensor& gate_up_R2F);

/// The same times a weight of each row, `weight_R1` [R, 1] in fp32: of a linear map that follows, the output is weighed, and need not
/// be kept to know the weight's gradient.
Tensor swiglu(const Tensor& gate_up_R2F, const Tensor& weight_R1);

/// What both are on a CPU, and what a GPU's kernel is held against. That one rounds once, where this rounds silu(gate), its product with
/// up, and that with the weight. `weight_R1` may be undefined.
Tensor swiglu_written_out(const Tensor& gate_up_R2F, const Tensor& weight_R1);

}  // namespace upcycle
