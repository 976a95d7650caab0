#pragma once
#include "ops/parameter.hpp"
#include "ops/rope.hpp"

// Shapes: N = B*S token rows, B sequences of S positions; H heads of q, G of k and of v, D head width; C = (H + 2 G) D columns.
namespace upcycle {

/// How the columns of a projection's output become heads: those of q stand first, then k's, then v's.
struct HeadColumns {
  int64_t sequences, heads, kv_heads;
  double eps;           ///< of the norms
  RotaryTable rotary;   ///< of the S positions
};

struct Heads {
  Tensor q_BSHD, k_BSGD;   ///< normed (rms_norm) and rotated (rotate)
  Tensor v_BSGD;           ///< a view of the columns
};

/// q, k and v for attention out of one projection's output, as one recorded op: backward keeps `qkv` alone, computes the norms again from
/// it, and writes the gradient of all columns at once. CUDA: a kernel each way where half a head is whole vectors of 16 bytes; else
/// written out.
Heads qk_norm_rope(const Tensor& qkv_NC, Parameter& q_norm_D, Parameter& k_norm_D, const HeadColumns&);

/// q or k once more, bit for bit; not recorded.
Tensor normed_q(const Tensor& qkv_NC, const Parameter& q_norm_D, const HeadColumns&);
Tensor normed_k(const Tensor& qkv_NC, const Parameter& k_norm_D, const HeadColumns&);

/// qk_norm_rope in ATen's operations: what CPUs do, and what the kernels are tested against.
Heads qk_norm_rope_written_out(const Tensor& qkv_NC, Parameter& q_norm_D, Parameter& k_norm_D, const HeadColumns&);

}  // namespace upcycle
