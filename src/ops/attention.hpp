#pragma once
#include <vector>

#include "ops/segments.hpp"

// Shapes: B sequences, S queries and P keys of each (the same without segments), H query heads, G key/value heads (H a multiple of G),
// D head width.
namespace upcycle {

struct Attended {
  Tensor out_BSHD;
  Tensor log_sum_exp_BHS;  ///< fp32, natural logarithm; not differentiable; merges of partial attentions need it
};

/// What one call of a kernel gives (dense_attention.hpp).
struct Dense {
  Tensor out_BHSD;
  Tensor log_sum_exp_BHS;   ///< fp32, natural logarithm
  Tensor seed, offset;      ///< of cuDNN: what its backward takes back from forward; undefined of others
};

/// What computes plain causal attention on a GPU.
enum class AttentionKernel {
  automatic,   ///< cudnn on Hopper and newer for 512 positions and more where it takes the shape, else flash
  cudnn,       ///< cuDNN's fused kernel: D a multiple of 8 up to 128. Its backward is not repeatable bit for bit
  flash        ///< ATen's flash kernel: D a multiple of 8 up to 256
};

/// Causal grouped-query attention, softmax(q k^T / sqrt(D)) v, where each query sees the keys of its segment up to its own (without
/// segments: all up to its own). q [B, S, H, D], k and v [B, P, G, D], one dtype. No mask of S x P lies in memory.
/// CPU: ATen's flash kernel. CUDA: cuDNN or ATen's flash kernel (always this one with segments that do not recur) for bf16 and fp16 where D
/// is a multiple of 8 up to 256; else written out. A shape that cuDNN refuses goes through flash from then on, which is logged once. Where
/// device::deterministic(), backward is flash's repeatable one. `kernel` other than automatic is for tests and benchmarks; ignored
/// but on a GPU without segments.
/// `own`: from attend_own.
Attended attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments = {}, AttentionKernel kernel = {},
                   const std::vector<Dense>& own = {});

/// The part of it that needs no keys but the queries' own, of each segment, before the others are there: `k` and `v` [B, S, G, D] are of
/// the positions that the queries are of. Empty where attention() makes no use of it. Nothing is recorded.
std::vector<Dense> attend_own(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments);

/// The same, written out: every score of a segment in memory, in fp32. What `attention` is tested against.
Attended attention_written_out(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments = {});

}  // namespace upcycle
