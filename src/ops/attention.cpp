// Plain causal attention by each kernel, the choice among them, and the form written out. With segments: segment_attention.cpp.
#include "ops/attention.hpp"

#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>

#include <array>
#include <cmath>
#include <mutex>
#include <set>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "device/device.hpp"
#include "ops/segment_attention.hpp"

namespace upcycle {
namespace {

Attended flash_cpu(const Tensor& q, const Tensor& k, const Tensor& v) {
  Tensor out, lse;
  {
    const Unrecorded guard;
    std::tie(out, lse) =
        at::_scaled_dot_product_flash_attention_for_cpu(heads_first(q), heads_first(k), heads_first(v), 0.0, true);
  }
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), out, lse](const std::vector<Tensor>& d) -> Gradients {
    const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        heads_first(d[0]), heads_first(q), heads_first(k), heads_first(v), out, lse, 0.0, true);
    return {heads_first(dq), heads_first(dk), heads_first(dv)};
  };
  return {record(heads_first(out), {q, k, v}, backward), lse};
}

Attended flash_cuda(const Tensor& q, const Tensor& k, const Tensor& v) {
  decltype(at::_scaled_dot_product_flash_attention(q, k, v)) forward;
  {
    const Unrecorded guard;
    forward = at::_scaled_dot_product_flash_attention(heads_first(q), heads_first(k), heads_first(v), 0.0, true);
  }
  const Tensor out = std::get<0>(forward), lse = std::get<1>(forward);
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), forward](const std::vector<Tensor>& d) -> Gradients {
    const auto& [out, lse, cumulative_q, cumulative_k, max_q, max_k, seed, offset, mask] = forward;
    const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
        heads_first(d[0]), heads_first(q), heads_first(k), heads_first(v), out, lse, cumulative_q, cumulative_k,
        max_q.expect_int(), max_k.expect_int(), 0.0, true, seed, offset);
    return {heads_first(dq), heads_first(dk), heads_first(dv)};
  };
  return {record(heads_first(out), {q, k, v}, backward), lse};
}

/// Shapes that cuDNN did not take: B, S, P, H, G, D and the dtype. Forward runs on the caller's thread, backward on autograd's.
class Refused {
 public:
  bool knows(const Tensor& q, const Tensor& k) {
    const std::lock_guard lock(mutex_);
    return shapes_.contains(shape(q, k));
  }
  void add(const Tensor& q, const Tensor& k, const char* pass, const c10::Error& why) {
    const std::lock_guard lock(mutex_);
    if (!shapes_.insert(shape(q, k)).second) return;
    const std::string reason = why.what_without_backtrace();
    log::warning(text("cuDNN's attention does not take the ", pass, " of ", q.size(0), " x ", q.size(1), " queries of ", q.size(2), "/",
                      k.size(2), " heads, ", q.size(3), " wide: flash attention instead (", reason.substr(0, reason.find('\n')), ")"));
  }

 private:
  using Shape = std::array<int64_t, 7>;
  static Shape shape(const Tensor& q, const Tensor& k) {
    return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), static_cast<int64_t>(q.scalar_type())};
  }
  std::mutex mutex_;
  std::set<Shape> shapes_;
};
Refused refused;

/// Flash attention's gradients for an output and log-sum-exp of any kernel.
Gradients flash_backward(const Tensor& d, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse_BHS) {
  const Tensor no_dropout = at::empty({2}, q.options().dtype(at::kLong));
  const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
      heads_first(d), heads_first(q), heads_first(k), heads_first(v), out, lse_BHS, /*cum_seq_q=*/{}, /*cum_seq_k=*/{}, q.size(1), k.size(1),
      0.0, true, no_dropout, no_dropout);
  return {heads_first(dq), heads_first(dk), heads_first(dv)};
}

// ATen keeps cuDNN's plans by the strides of q, k and v alone: the output's gradient must have the same ones each time.
Attended cudnn(const Tensor& q, const Tensor& k, const Tensor& v) {
  decltype(at::_scaled_dot_product_cudnn_attention(q, k, v, {}, true)) forward;
  {
    const Unrecorded guard;
    forward = at::_scaled_dot_product_cudnn_attention(heads_first(q), heads_first(k), heads_first(v), /*attn_bias=*/{},
                                                      /*compute_log_sumexp=*/true, 0.0, true);
  }
  const Tensor out = std::get<0>(forward), lse_BHS = std::get<1>(forward).view({q.size(0), q.size(2), q.size(1)});
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), forward, lse_BHS](const std::vector<Tensor>& d) -> Gradients {
    const auto& [out, lse, cumulative_q, cumulative_k, max_q, max_k, seed, offset, mask] = forward;
    const Tensor d_BSHD = d[0].contiguous();
    if (!device::deterministic() && !refused.knows(q, k)) {
      try {
        const auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
            heads_first(d_BSHD), heads_first(q), heads_first(k), heads_first(v), out, lse, seed, offset, /*attn_bias=*/{}, cumulative_q,
            cumulative_k, max_q.expect_int(), max_k.expect_int(), 0.0, true);
        return {heads_first(dq), heads_first(dk), heads_first(dv)};
      } catch (const c10::OutOfMemoryError&) {
        throw;
      } catch (const c10::Error& error) {
        refused.add(q, k, "backward", error);
      }
    }
    return flash_backward(d_BSHD, q, k, v, out, lse_BHS);
  };
  return {record(heads_first(out), {q, k, v}, backward), lse_BHS};
}

Attended plain_cuda(const Tensor& q, const Tensor& k, const Tensor& v, AttentionKernel kernel) {
  if (kernel == AttentionKernel::cudnn) return cudnn(q, k, v);
  // Each shape costs a plan, some tenths of a second; before Hopper the two kernels are alike.
  constexpr int64_t kWorthAPlan = 512;
  const bool better = q.numel() > 0 && q.size(1) >= kWorthAPlan && q.size(-1) <= 128 && device::compute_capability(q.device()) >= 90;
  if (kernel == AttentionKernel::flash || !better || refused.knows(q, k)) return flash_cuda(q, k, v);
  try {
    return cudnn(q, k, v);
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error& error) {
    refused.add(q, k, "forward", error);
    return flash_cuda(q, k, v);
  }
}

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

Attended attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, AttentionKernel wish) {
  if (!q.is_cuda()) return segments.plain() ? flash_cpu(q, k, v) : segments_cpu(q, k, v, segments);
  const bool kernel = q.scalar_type() != at::kFloat && q.size(-1) % 8 == 0 && q.size(-1) <= 256;
  if (!kernel) return attention_written_out(q, k, v, segments);
  return segments.plain() ? plain_cuda(q, k, v, wish) : segments_cuda(q, k, v, segments);
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
