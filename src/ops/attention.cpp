#include "ops/attention.hpp"

#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <mutex>
#include <set>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "device/device.hpp"

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

// A rectangle of a segment's scores that the CPU's kernel can do. It aligns its causal mask at the first key, not at the last: so a
// segment that sees earlier keys goes in two parts, those keys without a mask and its own square with one.
struct Part {
  int64_t k_begin, keys;
  bool causal;
};

// Some positions of some sequences of x [B, S, H, D], for ATen's kernels.
Tensor block(const Tensor& x, int64_t first, int64_t count, int64_t begin, int64_t size) {
  return heads_first(x.narrow(0, first, count).narrow(1, begin, size));
}

std::vector<Part> parts_of(const Segment& s) {
  std::vector<Part> parts;
  if (s.keys() > s.queries()) parts.push_back({s.k_begin, s.keys() - s.queries(), false});
  parts.push_back({s.k_end - s.queries(), s.queries(), true});
  return parts;
}

Attended segments_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  {
    const Unrecorded guard;
    segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
      const auto queries = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
      Tensor merged, merged_lse;
      for (const Part& part : parts_of(s)) {
        const auto keys = [&](const Tensor& x) { return block(x, first, count, part.k_begin, part.keys); };
        const auto [o, l] = at::_scaled_dot_product_flash_attention_for_cpu(queries(q), keys(k), keys(v), 0.0, part.causal);
        if (!merged.defined()) {
          merged = o, merged_lse = l;
          continue;
        }
        // Each part is normalised by its own sum of exponentials; the whole by the sum of both.
        const Tensor both = at::logaddexp(merged_lse, l);
        merged = merged * (merged_lse - both).exp_().unsqueeze(-1) + o * (l - both).exp_().unsqueeze(-1);
        merged_lse = both;
      }
      queries(out).copy_(merged);
      lse.narrow(0, first, count).narrow(2, s.q_begin, s.queries()).copy_(merged_lse);
    });
  }
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), out, lse, segments](const std::vector<Tensor>& d) -> Gradients {
    const Tensor dq = at::zeros(q.sizes(), q.options());
    const Tensor dk = at::zeros(k.sizes(), k.options()), dv = at::zeros(v.sizes(), v.options());
    segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
      const auto queries = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
      const Tensor sums = lse.narrow(0, first, count).narrow(2, s.q_begin, s.queries());
      for (const Part& part : parts_of(s)) {
        const auto keys = [&](const Tensor& x) { return block(x, first, count, part.k_begin, part.keys); };
        // With the whole's output and log-sum-exp, the probabilities that backward computes anew are the whole's.
        const auto [part_dq, part_dk, part_dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
            queries(d[0]), queries(q), keys(k), keys(v), queries(out), sums, 0.0, part.causal);
        queries(dq).add_(part_dq);
        keys(dk).add_(part_dk);
        keys(dv).add_(part_dv);
      }
    });
    return {dq, dk, dv};
  };
  return {record(out, {q, k, v}, backward), lse};
}

// The rows of all sequences' keys or values, as the segments see them one after another.
Tensor seen_rows(const Tensor& x_BSGD, const Segments& segments) {
  const Tensor rows = x_BSGD.reshape({-1, x_BSGD.size(2), x_BSGD.size(3)});
  if (segments.keys_in_place()) return rows;
  std::vector<Tensor> ranges;
  for (const auto& [begin, end] : segments.rows().keys) ranges.push_back(rows.narrow(0, begin, end - begin));
  return at::cat(ranges);
}

// Its transpose: each row's gradient is the sum over the segments that saw it.
Tensor sum_rows(const Tensor& dx_RGD, const Tensor& x_BSGD, const Segments& segments) {
  if (segments.keys_in_place()) return dx_RGD.view(x_BSGD.sizes());
  const Tensor sum = at::zeros(x_BSGD.sizes(), x_BSGD.options());
  const Tensor rows = sum.view({-1, x_BSGD.size(2), x_BSGD.size(3)});
  int64_t from = 0;
  for (const auto& [begin, end] : segments.rows().keys) {
    rows.narrow(0, begin, end - begin).add_(dx_RGD.narrow(0, from, end - begin));
    from += end - begin;
  }
  return sum;
}

// All segments in one call of the kernel for sequences of different lengths, whose causal mask is aligned at the last key. Not cuDNN: ATen
// 2.11 plans it anew at each call, gives it wrong borders of the log-sum-exp, and logs a line for each backward.
Attended segments_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  const int64_t sequences = q.size(0), queries = q.size(1), heads = q.size(2);
  const Segments::Rows& rows = segments.rows();
  Tensor q_rows, k_rows, v_rows;
  decltype(at::_flash_attention_forward(q, k, v, q, k, 0, 0, 0.0, true, false)) forward;
  {
    const Unrecorded guard;
    q_rows = q.reshape({-1, heads, q.size(3)}), k_rows = seen_rows(k, segments), v_rows = seen_rows(v, segments);
    forward = at::_flash_attention_forward(q_rows, k_rows, v_rows, rows.q_ends, rows.k_ends, rows.longest_q, rows.longest_k, 0.0,
                                           /*is_causal=*/true, /*return_debug_mask=*/false);
  }
  auto backward = [q_rows, k_rows, v_rows, q = q.detach(), k = k.detach(), forward,
                   segments](const std::vector<Tensor>& d) -> Gradients {
    const auto& [out, lse, seed, offset, mask] = forward;
    const Segments::Rows& rows = segments.rows();
    const auto [dq, dk, dv] =
        at::_flash_attention_backward(d[0].reshape(q_rows.sizes()), q_rows, k_rows, v_rows, out, lse, rows.q_ends, rows.k_ends,
                                      rows.longest_q, rows.longest_k, 0.0, true, seed, offset);
    return {dq.view(q.sizes()), sum_rows(dk, k, segments), sum_rows(dv, k, segments)};
  };
  const Tensor lse_HBS = std::get<1>(forward).view({heads, sequences, queries});
  return {record(std::get<0>(forward).view(q.sizes()), {q, k, v}, backward), lse_HBS.transpose(0, 1)};
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
