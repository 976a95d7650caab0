#include "ops/dense_attention.hpp"

#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "base/log.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

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
    log::warning(text("cuDNN's attention does not take the ", pass, " of ", q.size(0), " x ", q.size(2), " queries of ", q.size(1), "/",
                      k.size(1), " heads, ", q.size(3), " wide: flash attention instead (", reason.substr(0, reason.find('\n')), ")"));
  }

 private:
  using Shape = std::array<int64_t, 7>;
  static Shape shape(const Tensor& q, const Tensor& k) {
    return {q.size(0), q.size(2), k.size(2), q.size(1), k.size(1), q.size(3), static_cast<int64_t>(q.scalar_type())};
  }
  std::mutex mutex_;
  std::set<Shape> shapes_;
};
Refused refused;

/// `call()`, unless cuDNN refuses the shape, now or before.
template <class Call>
auto unless_refused(const Tensor& q, const Tensor& k, const char* pass, Call&& call) -> std::optional<decltype(call())> {
  if (refused.knows(q, k)) return std::nullopt;
  try {
    return call();
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error& error) {
    refused.add(q, k, pass, error);
    return std::nullopt;
  }
}

Dense cudnn(const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
  const auto forward = at::_scaled_dot_product_cudnn_attention(q, k, v, /*attn_bias=*/{}, /*compute_log_sumexp=*/true, 0.0, causal);
  return {std::get<0>(forward), std::get<1>(forward).view({q.size(0), q.size(1), q.size(2)}), std::get<6>(forward), std::get<7>(forward)};
}

// ATen keeps cuDNN's plans by the shapes and strides of q, k and v alone: those of the others must be the same each time.
std::array<Tensor, 3> cudnn_backward(const Tensor& d, const Tensor& q, const Tensor& k, const Tensor& v, const Dense& whole, bool causal) {
  auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
      d, q, k, v, whole.out_BHSD, whole.log_sum_exp_BHS.contiguous().unsqueeze(-1), whole.seed, whole.offset, /*attn_bias=*/{}, /*cum_seq_q=*/{},
      /*cum_seq_k=*/{}, q.size(2), k.size(2), 0.0, causal);
  return {dq, dk, dv};
}

Dense flash(const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
  const auto forward = at::_scaled_dot_product_flash_attention(q, k, v, 0.0, causal);
  return {std::get<0>(forward), std::get<1>(forward), {}, {}};
}

std::array<Tensor, 3> flash_backward(const Tensor& d, const Tensor& q, const Tensor& k, const Tensor& v, const Dense& whole, bool causal) {
  const Tensor no_dropout = at::empty({2}, q.options().dtype(at::kLong));
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(d, q, k, v, whole.out_BHSD, whole.log_sum_exp_BHS, /*cum_seq_q=*/{},
                                                                       /*cum_seq_k=*/{}, q.size(2), k.size(2), 0.0, causal, no_dropout, no_dropout);
  return {dq, dk, dv};
}

}  // namespace

bool worth_a_plan(const Tensor& q, int64_t queries, int64_t keys) {
  constexpr int64_t kPositions = 512;
  // Before Hopper the two kernels are alike.
  return q.numel() > 0 && std::min(queries, keys) >= kPositions && q.size(-1) <= 128 && device::compute_capability(q.device()) >= 90;
}

Dense dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, AttentionKernel kernel) {
  if (!q.is_cuda()) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal);
    return {out, lse, {}, {}};
  }
  if (kernel == AttentionKernel::cudnn) return cudnn(q, k, v, causal);
  if (kernel == AttentionKernel::automatic && worth_a_plan(q, q.size(2), k.size(2))) {
    if (auto done = unless_refused(q, k, "forward", [&] { return cudnn(q, k, v, causal); })) return *done;
  }
  return flash(q, k, v, causal);
}

std::array<Tensor, 3> dense_attention_backward(const Tensor& d, const Tensor& q, const Tensor& k, const Tensor& v, const Dense& whole, bool causal) {
  if (!q.is_cuda()) {
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(d, q, k, v, whole.out_BHSD, whole.log_sum_exp_BHS, 0.0, causal);
    return {dq, dk, dv};
  }
  if (whole.seed.defined() && !device::deterministic()) {
    if (auto done = unless_refused(q, k, "backward", [&] { return cudnn_backward(d, q, k, v, whole, causal); })) return *done;
  }
  return flash_backward(d, q, k, v, whole, causal);
}

}  // namespace upcycle
