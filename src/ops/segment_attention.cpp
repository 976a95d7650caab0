#include "ops/segment_attention.hpp"

#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <set>

#include "base/autograd.hpp"
#include "ops/attention_parts.hpp"
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

/// What some keys of some sequences get of one part's backward.
struct KeyGradients {
  int64_t first, count, begin, end;
  Tensor dk_BGPD, dv_BGPD;
};

/// The sum of all of them, one list of segments after another, in `to` [B, P, G, D]; zeros where nobody has looked.
void sum_over_keys(const Tensor& to_BPGD, const std::vector<KeyGradients>& all, Tensor KeyGradients::* which) {
  for (auto list = all.begin(), next = list; list != all.end(); list = next) {
    next = std::find_if(list, all.end(), [&](const KeyGradients& one) { return one.first != list->first; });
    std::set<int64_t> borders = {0, to_BPGD.size(1)};   // they cut the keys into stretches, each of which the same ones have seen
    for (auto one = list; one != next; ++one) borders.insert({one->begin, one->end});
    for (auto begin = borders.begin(), end = std::next(begin); end != borders.end(); begin = end++) {
      std::vector<Tensor> parts;
      for (auto one = list; one != next; ++one) {
        if (one->begin <= *begin && *end <= one->end) parts.push_back(((*one).*which).narrow(2, *begin - one->begin, *end - *begin));
      }
      const Tensor stretch = block(to_BPGD, list->first, list->count, *begin, *end - *begin);
      if (parts.empty()) {
        stretch.zero_();
      } else {
        sum_parts(stretch, parts);
      }
    }
  }
}

}  // namespace

Attended segments_by_parts(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, const std::vector<Dense>& own) {
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  std::vector<Dense> done;   // of each part, for backward; without its own output
  {
    const Unrecorded guard;
    auto square = own.begin();
    segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
      const auto queries = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
      std::vector<Dense> parts;
      for (const Part& part : parts_of(s)) {
        const auto keys = [&](const Tensor& x) { return block(x, first, count, part.k_begin, part.keys); };
        const bool made = part.causal && square != own.end();
        parts.push_back(made ? *square++ : dense_attention(queries(q), keys(k), keys(v), part.causal, AttentionKernel::automatic));
        done.push_back({{}, {}, parts.back().seed, parts.back().offset});
      }
      const Tensor lse_of_segment = lse.narrow(0, first, count).narrow(2, s.q_begin, s.queries());
      if (parts.size() == 1) {
        queries(out).copy_(parts[0].out_BHSD);
        lse_of_segment.copy_(parts[0].log_sum_exp_BHS);
      } else {
        merge_parts(queries(out), lse_of_segment, parts[0], parts[1]);
      }
    });
  }
  auto backward = [q = q.detach(), k = k.detach(), v = v.detach(), out, lse, done, segments](const std::vector<Tensor>& gradient) -> Gradients {
    const Tensor d = gradient[0].contiguous();
    const auto gradient_of = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
    const Tensor dq = gradient_of(q), dk = gradient_of(k), dv = gradient_of(v);
    std::vector<KeyGradients> of_keys;
    auto next = done.begin();
    segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
      const auto queries = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
      std::vector<Tensor> of_queries;
      for (const Part& part : parts_of(s)) {
        const auto keys = [&](const Tensor& x) { return block(x, first, count, part.k_begin, part.keys); };
        const Dense whole{queries(out), lse.narrow(0, first, count).narrow(2, s.q_begin, s.queries()).contiguous(), next->seed, next->offset};
        const auto [part_dq, part_dk, part_dv] = dense_attention_backward(queries(d), queries(q), keys(k), keys(v), whole, part.causal);
        of_queries.push_back(part_dq);
        of_keys.push_back({first, count, part.k_begin, part.k_begin + part.keys, part_dk, part_dv});
        ++next;
      }
      sum_parts(queries(dq), of_queries);
    });
    sum_over_keys(dk, of_keys, &KeyGradients::dk_BGPD);
    sum_over_keys(dv, of_keys, &KeyGradients::dv_BGPD);
    return {dq, dk, dv};
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

namespace {

bool by_parts(const Tensor& q, const Segments& segments) {
  bool parts = q.is_cpu() || segments.recurring();
  if (q.is_cuda()) {
    segments.for_each([&](int64_t, int64_t, const Segment& s) {
      for (const Part& part : parts_of(s)) parts = parts && worth_a_plan(q, s.queries(), part.keys);
    });
  }
  return parts;
}

}  // namespace

Attended segment_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, const std::vector<Dense>& own) {
  return by_parts(q, segments) ? segments_by_parts(q, k, v, segments, own) : segments_as_rows(q, k, v, segments);
}

std::vector<Dense> own_squares(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) {
  std::vector<Dense> squares;
  if (!by_parts(q, segments)) return squares;
  const Unrecorded guard;
  segments.for_each([&](int64_t first, int64_t count, const Segment& s) {
    const auto own = [&](const Tensor& x) { return block(x, first, count, s.q_begin, s.queries()); };
    squares.push_back(dense_attention(own(q), own(k), own(v), /*causal=*/true, AttentionKernel::automatic));
  });
  return squares;
}

}  // namespace upcycle
