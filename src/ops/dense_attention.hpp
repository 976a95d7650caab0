#pragma once
#include <array>

#include "ops/attention.hpp"

// One call of a kernel: queries that see all keys, or, `causal`, as many keys as there are queries, each up to its own. Heads come before
// positions here, as ATen's kernels want them: q [B, H, S, D], k and v [B, G, P, D], out and its gradient as q. Nothing is recorded.
namespace upcycle {

inline Tensor heads_first(const Tensor& x_BSHD) { return x_BSHD.transpose(1, 2); }

/// True where `AttentionKernel::automatic` is cuDNN for so many queries and keys: each shape costs a plan, some tenths of a second.
bool worth_a_plan(const Tensor& q, int64_t queries, int64_t keys);

/// CPU: ATen's flash kernel. CUDA: cuDNN or ATen's flash kernel, as attention() says.
Dense dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, AttentionKernel kernel);

/// The gradients of q, k and v for the output's, `d`. `whole`: what forward returned. Where it was one part of the keys that the queries
/// see: out and log-sum-exp of all parts together, so that the probabilities which backward computes anew are the whole's.
std::array<Tensor, 3> dense_attention_backward(const Tensor& d, const Tensor& q, const Tensor& k, const Tensor& v, const Dense& whole, bool causal);

}  // namespace upcycle
