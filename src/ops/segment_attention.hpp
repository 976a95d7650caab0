#pragma once
#include "ops/attention.hpp"

namespace upcycle {

/// `attention` and `attend_own` where queries see segments of the keys (not for plain segments), by kernels.
Attended segment_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&, const std::vector<Dense>& own = {});
std::vector<Dense> own_squares(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&);

/// Part by part, each a rectangle of a segment's scores that dense_attention can do. On a GPU for bf16 and fp16, D a multiple of 8 up to 256.
Attended segments_by_parts(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&, const std::vector<Dense>& own = {});
/// By ATen's flash kernel for sequences of different lengths, all in one call, on a GPU: bf16 and fp16, D a multiple of 8 up to 256.
Attended segments_as_rows(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&);

}  // namespace upcycle
