#pragma once
#include "base/tensor.hpp"

// Shapes: R rows (any leading dims), F width of the feed-forward.
namespace upcycle {

/// silu(gate) * up (Shazeer, 2002.05202) for gate_up [..., 2F] with the gate first; the result is [..., F].
Tensor swiglu(const Tensor& gate_up_R2F);

}  // namespace upcycle
