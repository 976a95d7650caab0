#include "ops/segment_attention.hpp"

#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "base/autograd.hpp"
#include "ops/dense_attention.hpp"

namespace upcycle {
namespace {

// A rectangle of a segment's scores that a dense kernel can do. Those align their causal mask at the first key, not at the last: so a
// segment that sees earlier keys goes in two parts, those keys without a mask and its own square with one.
struct Part {
  int64_t k_begin, keys;
  bool causal;
};

// Some positions of some sequences of x [B, S, H, D], for the kernels.
Tensor block(const Tensor& x, int64_t first, int64_t count, int64_t begin, int64_t size) {
  return heads_first(x.narrow(0, first, count).narrow(1, begin, size));
}

std::vector<Part> parts_of(const Segment& s) {
  std::vector<Part> parts;
  if (s.keys() > s.queries()) parts.push_back({s.k_begin, s.keys() - s.queries(), false});
  parts.push_back({s.k_end - s.queries(), s.queries(), true});
  return parts;
}

}  // namespace

Attended segments_by_parts(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  std::vector<Dense> done;   // of each part, for backward; without its own output
  {
    const Unrecorded guard;
    segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
      const auto queries = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
      Tensor merged, merged_lse;
      for (const Part& part : parts_of(s)) {
        const auto keys = [&](const Tensor& x) { return block(x, first, count, part.k_begin, part.keys); };
        const Dense dense = dense_attention(queries(q), keys(k), keys(v), part.causal, AttentionKernel::automatic);
        done.push_back({{}, {}, dense.seed, dense.offset});
        if (!merged.defined()) {
          merged = dense.out_BHSD, merged_lse = dense.log_sum_exp_BHS;
          continue;
        }
        // Each part is normalised by its own sum of exponentials; the whole by the sum of both.
        const Tensor both = at::logaddexp(merged_lse, dense.log_sum_exp_BHS);
        merged = merged * (merged_lse - both).exp_().unsqueeze(-1) + dense.out_BHSD * (dense.log_sum_exp_BHS - both).exp_().unsqueeze(-1);
        merged_lse = both;
      }
      queries(out).copy_(merged);
      lse.narrow(0, first, count).narrow(2, s.q_begin, s.queries()).copy_(merged_lse);
    });
  }
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), out, lse, done, segments](const std::vector<Tensor>& gradient) -> Gradients {
    const Tensor d = gradient[0].contiguous();
    const auto sums = [](const Tensor& x) { return at::zeros(x.sizes(), x.options().dtype(at::kFloat)); };
    const Tensor dq = sums(q), dk = sums(k), dv = sums(v);
    auto next = done.begin();
    segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
      const auto queries = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
      for (const Part& part : parts_of(s)) {
        const auto keys = [&](const Tensor& x) { return block(x, first, count, part.k_begin, part.keys); };
        const Dense whole{queries(out), lse.narrow(0, first, count).narrow(2, s.q_begin, s.queries()).contiguous(), next->seed, next->offset};
        const auto [part_dq, part_dk, part_dv] = dense_attention_backward(queries(d), queries(q), keys(k), keys(v), whole, part.causal);
        queries(dq).add_(part_dq);
        keys(dk).add_(part_dk);
        keys(dv).add_(part_dv);
        ++next;
      }
    });
    return {dq.to(q.scalar_type()), dk.to(k.scalar_type()), dv.to(v.scalar_type())};
  };
  return {record(out, {q, k, v}, backward), lse};
}

namespace {

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

}  // namespace

// All segments in one call of the kernel for sequences of different lengths, whose causal mask is aligned at the last key. Not cuDNN: ATen
// 2.11 plans it anew at each call, gives it wrong borders of the log-sum-exp, and logs a line for each backward.
Attended segments_as_rows(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
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

Attended segment_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  bool by_parts = q.is_cpu() || segments.recurring();
  if (q.is_cuda()) {
    segments.for_each([&](int64_t, int64_t, const Segment& s) {
      for (const Part& part : parts_of(s)) by_parts = by_parts && worth_a_plan(q, s.queries(), part.keys);
    });
  }
  return by_parts ? segments_by_parts(q, k, v, segments) : segments_as_rows(q, k, v, segments);
}

}  // namespace upcycle
