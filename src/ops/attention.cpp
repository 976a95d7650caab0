// Plain causal attention, and the form written out. Its kernels: dense_attention.cpp. With segments: segment_attention.cpp.
#include "ops/attention.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>

#include <cmath>

#include "base/autograd.hpp"
#include "ops/dense_attention.hpp"
#include "ops/segment_attention.hpp"

namespace upcycle {
namespace {

Attended plain(const Tensor& q, const Tensor& k, const Tensor& v, AttentionKernel kernel) {
  Dense whole;
  {
    const Unrecorded guard;
    whole = dense_attention(heads_first(q), heads_first(k), heads_first(v), /*causal=*/true, kernel);
  }
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), whole](const std::vector<Tensor>& d) -> Gradients {
    const auto [dq, dk, dv] =
        dense_attention_backward(heads_first(d[0].contiguous()), heads_first(q), heads_first(k), heads_first(v), whole, /*causal=*/true);
    return {heads_first(dq), heads_first(dk), heads_first(dv)};
  };
  return {record(heads_first(whole.out_BHSD), {q, k, v}, backward), whole.log_sum_exp_BHS};
}

bool kernel_takes(const Tensor& q) { return q.is_cpu() || (q.scalar_type() != at::kFloat && q.size(-1) % 8 == 0 && q.size(-1) <= 256); }

// Every score of one segment; ATen differentiates it.
Attended segment_written_out(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t queries_per_key = q.size(2) / k.size(2), queries = q.size(1), keys = k.size(1);
  const auto spread = [&](const Tensor& x) {
    return heads_first(x).to(at::kFloat).repeat_interleave(queries_per_key, 1);  // [B, H, S, D]
  };
  const Tensor scores = at::matmul(heads_first(q).to(at::kFloat), spread(k).transpose(-1, -2)) / std::sqrt(q.size(-1));
  const Tensor future = at::ones({queries, keys}, q.options().dtype(at::kBool)).triu(1 + keys - queries);
  const Tensor seen = scores.masked_fill(future, -INFINITY);
  const Tensor out = at::matmul(at::softmax(seen, -1), spread(v));
  return {heads_first(out).to(q.scalar_type()), at::logsumexp(seen.detach(), {-1})};
}

}  // namespace

Attended attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, AttentionKernel wish, const std::vector<Dense>& own) {
  if (!kernel_takes(q)) return attention_written_out(q, k, v, segments);
  return segments.plain() ? plain(q, k, v, wish) : segment_attention(q, k, v, segments, own);
}

std::vector<Dense> attend_own(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  if (!kernel_takes(q) || segments.plain()) return {};
  return own_squares(q, k, v, segments);
}

Attended attention_written_out(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  if (segments.plain()) return segment_written_out(q, k, v);
  std::vector<std::vector<Tensor>> out(q.size(0)), lse(q.size(0));   // of each list of segments, by its first sequence
  segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
    const auto keys = [&](const Tensor& x) { return x.narrow(0, first, count).narrow(1, s.k_begin, s.keys()); };
    const Attended part = segment_written_out(q.narrow(0, first, count).narrow(1, s.q_begin, s.queries()), keys(k), keys(v));
    out[first].push_back(part.out_BSHD);
    lse[first].push_back(part.log_sum_exp_BHS);
  });
  std::vector<Tensor> out_of_list, lse_of_list;
  for (size_t b = 0; b < out.size() && !out[b].empty(); ++b) {
    out_of_list.push_back(at::cat(out[b], 1));
    lse_of_list.push_back(at::cat(lse[b], 2));
  }
  return {at::cat(out_of_list), at::cat(lse_of_list)};
}

}  // namespace upcycle
