#include "ops/attention.hpp"

#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>

#include <cmath>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

// ATen's kernels want heads before positions.
Tensor heads_first(const Tensor& x_BSHD) { return x_BSHD.transpose(1, 2); }

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

}  // namespace

Attended attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (!q.is_cuda()) return flash_cpu(q, k, v);
  const bool kernel = q.scalar_type() != at::kFloat && q.size(-1) % 8 == 0 && q.size(-1) <= 256;
  return kernel ? flash_cuda(q, k, v) : attention_written_out(q, k, v);
}

Attended attention_written_out(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t queries_per_key = q.size(2) / k.size(2), length = q.size(1);
  const auto spread = [&](const Tensor& x) {
    return heads_first(x).to(at::kFloat).repeat_interleave(queries_per_key, 1);  // [B, H, S, D]
  };
  const Tensor scores = at::matmul(heads_first(q).to(at::kFloat), spread(k).transpose(-1, -2)) / std::sqrt(q.size(-1));
  const Tensor future = at::ones({length, length}, q.options().dtype(at::kBool)).triu(1);
  const Tensor seen = scores.masked_fill(future, -INFINITY);
  const Tensor out = at::matmul(at::softmax(seen, -1), spread(v));
  return {heads_first(out).to(q.scalar_type()), at::logsumexp(seen.detach(), {-1})};
}

}  // namespace upcycle
