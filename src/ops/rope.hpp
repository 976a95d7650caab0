#pragma once
#include "base/tensor.hpp"

// Shapes: B sequences, S positions, H heads, D head width.
namespace upcycle {

/// Cosines and sines of rotary position embedding (Su et al., 2104.09864), fp32 [S, D]; both halves of D hold the same angles.
struct RotaryTable {
  Tensor cos_SD;
  Tensor sin_SD;
};
RotaryTable rotary_table(int64_t positions, int64_t head_dim, double theta, at::Device device);

/// Rotates pairs (d, d + D/2) ("half-split", as Hugging Face's Qwen3). `x` [B, S, H, D], any dtype; computed in fp32.
Tensor rotate(const Tensor& x_BSHD, const RotaryTable& table);
/// Its backward, not recorded.
Tensor rotate_back(const Tensor& dy_BSHD, const RotaryTable& table);

}  // namespace upcycle
