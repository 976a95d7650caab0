#pragma once
#include "ops/attention.hpp"

// `attention` where queries see segments of the keys (not for plain segments), and what it shares with the plain form.
namespace upcycle {

/// ATen's kernels want heads before positions.
inline Tensor heads_first(const Tensor& x_BSHD) { return x_BSHD.transpose(1, 2); }

/// By ATen's flash kernel for the CPU, segment by segment.
Attended segments_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&);
/// By ATen's flash kernel for sequences of different lengths, all in one call: bf16 and fp16, D a multiple of 8 up to 256.
Attended segments_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&);

}  // namespace upcycle
