#include "ops/attention.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <cmath>

#include "base/autograd.hpp"
#include "unit/ops/reference.hpp"

// Shapes: B sequences, S positions, H query heads, G key/value heads, D head width.
namespace upcycle {
namespace {

/// Head by head: query head h reads key/value head h * G / H. In the dtype of its inputs.
Tensor masked_scores(const Tensor& q, const Tensor& k, int64_t h) {
  const int64_t length = q.size(1), group = h * k.size(2) / q.size(2);
  const Tensor scores = at::matmul(q.select(2, h), k.select(2, group).transpose(1, 2)) / std::sqrt(static_cast<double>(q.size(3)));
  return scores + at::full({length, length}, -INFINITY, q.options()).triu(1);
}

Tensor head_by_head(const Tensor& q, const Tensor& k, const Tensor& v) {
  std::vector<Tensor> heads;
  for (int64_t h = 0; h < q.size(2); ++h) {
    heads.push_back(at::matmul(at::softmax(masked_scores(q, k, h), -1), v.select(2, h * k.size(2) / q.size(2))));
  }
  return at::stack(heads, 2);
}

struct Form {
  int64_t batch, length, heads, groups, width;
};
// GQA of 1, 2, 8 and all heads on one; lengths around the kernel's blocks; widths that are no power of two.
const std::vector<Form> kForms = {{2, 9, 4, 4, 16}, {1, 33, 4, 2, 24}, {2, 65, 8, 1, 8}, {1, 130, 16, 2, 128}, {1, 7, 6, 3, 10}};

using Attend = Attended (*)(const Tensor& q, const Tensor& k, const Tensor& v, const Segments&);
Attended ours(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments) { return attention(q, k, v, segments); }

void expect_attention(Attend op, int roundings) {
  for (const Form& f : kForms) {
    SCOPED_TRACE(testing::Message() << f.length << " positions, " << f.heads << "/" << f.groups << " heads of " << f.width);
    const Shape q = {f.batch, f.length, f.heads, f.width}, kv = {f.batch, f.length, f.groups, f.width};
    expect_matches({{q, kv, kv}, {}, roundings, 2e-6}, [&](const auto& x, auto&) { return op(x[0], x[1], x[2], {}).out_BSHD; },
                   [](const auto& x, const auto&) { return head_by_head(x[0], x[1], x[2]); });
  }
}

TEST(Attention, FlashIsTheFormula) { expect_attention(&ours, 3); }  // scores and probabilities are rounded, too
TEST(Attention, WrittenOutIsTheFormula) { expect_attention(&attention_written_out, 2); }

TEST(Attention, LogSumExpOfTheScores) {
  for (const Form& f : kForms) {
    const Tensor q = normal({f.batch, f.length, f.heads, f.width}, 1), k = normal({f.batch, f.length, f.groups, f.width}, 2);
    const Tensor v = normal({f.batch, f.length, f.groups, f.width}, 3);
    const Unrecorded guard;
    std::vector<Tensor> expected;
    for (int64_t h = 0; h < f.heads; ++h) {
      expected.push_back(at::logsumexp(masked_scores(q.to(at::kDouble), k.to(at::kDouble), h), {-1}));
    }
    for (const Attended& attended : {attention(q, k, v), attention_written_out(q, k, v)}) {
      EXPECT_EQ(attended.log_sum_exp_BHS.scalar_type(), at::kFloat);
      // Absolute: a sum of one term may be near 0.
      EXPECT_LE((attended.log_sum_exp_BHS.to(at::kDouble) - at::stack(expected, 1)).abs().max().item<double>(), 1e-5);
    }
  }
}

/// Segments over 2 sequences of 13 queries and 17 keys (or fewer), among them: single queries and keys, a square, keys of nobody,
/// keys of several segments.
const std::vector<std::vector<Segment>> kDifferent = {
    {{0, 1, 0, 1}, {1, 6, 1, 6}, {6, 7, 0, 17}, {7, 13, 5, 16}}, {{0, 13, 2, 17}}};
const std::vector<std::vector<Segment>> kAlike = {{{0, 4, 3, 9}, {4, 5, 8, 9}, {5, 13, 0, 17}}};

/// The formula with a mask for all: query i of a segment sees its keys but the last `queries - 1 - i`.
Tensor masked(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<std::vector<Segment>>& segments) {
  std::vector<Tensor> mask;
  for (int64_t b = 0; b < q.size(0); ++b) {
    const Tensor m = at::full({q.size(1), k.size(1)}, -INFINITY, q.options());
    for (const Segment& s : segments[segments.size() == 1 ? 0 : b]) {
      for (int64_t i = s.q_begin; i < s.q_end; ++i) m.select(0, i).narrow(0, s.k_begin, s.keys() - (s.q_end - 1 - i)).fill_(0.0);
    }
    mask.push_back(m);
  }
  std::vector<Tensor> heads;
  for (int64_t h = 0; h < q.size(2); ++h) {
    const int64_t group = h * k.size(2) / q.size(2);
    const Tensor scores = at::matmul(q.select(2, h), k.select(2, group).transpose(1, 2)) / std::sqrt(static_cast<double>(q.size(3)));
    heads.push_back(at::matmul(at::softmax(scores + at::stack(mask), -1), v.select(2, group)));
  }
  return at::stack(heads, 2);
}

void expect_segments(Attend op, int roundings) {
  for (const auto& [heads, groups, width] : {std::tuple{4, 4, 16}, {4, 2, 10}, {6, 1, 24}}) {
    for (const auto& segments : {kDifferent, kAlike}) {
      SCOPED_TRACE(testing::Message() << heads << "/" << groups << " heads of " << width << ", " << segments.size() << " lists");
      const Shape q = {2, 13, heads, width}, kv = {2, 17, groups, width};
      const Segments built(segments, 2, 13, 17, at::kCPU);
      expect_matches({{q, kv, kv}, {}, roundings, 2e-6}, [&](const auto& x, auto&) { return op(x[0], x[1], x[2], built).out_BSHD; },
                     [&](const auto& x, const auto&) { return masked(x[0], x[1], x[2], segments); });
    }
  }
}

// A segment in two parts has each part's output and gradients rounded before they are summed.
TEST(Attention, FlashSegmentsAreTheFormula) { expect_segments(&ours, 4); }
TEST(Attention, WrittenOutSegmentsAreTheFormula) { expect_segments(&attention_written_out, 3); }

TEST(Attention, LogSumExpOfSegments) {
  const Tensor q = normal({2, 13, 4, 16}, 1), k = normal({2, 17, 2, 16}, 2), v = normal({2, 17, 2, 16}, 3);
  for (const auto& list : {kDifferent, kAlike}) {
    const Segments segments(list, 2, 13, 17, at::kCPU);
    const Tensor a = attention(q, k, v, segments).log_sum_exp_BHS, b = attention_written_out(q, k, v, segments).log_sum_exp_BHS;
    ASSERT_EQ(a.sizes(), b.sizes());
    EXPECT_LE((a - b).abs().max().item<double>(), 1e-5);
  }
}

/// Outputs and gradients of one sequence of `length`, or of a stretch of it by itself.
std::vector<Tensor> attend(const std::vector<Tensor>& qkvd, int64_t begin, int64_t end, const Segments& segments) {
  std::vector<Tensor> x;
  for (const Tensor& whole : qkvd) x.push_back(whole.narrow(1, begin, end - begin).clone());
  for (int i = 0; i < 3; ++i) x[i].requires_grad_();
  const Tensor out = attention(x[0], x[1], x[2], segments).out_BSHD;
  run_backward(out, x[3]);
  return {out.detach(), x[0].grad(), x[1].grad(), x[2].grad()};
}

TEST(Attention, PackedDocumentsAreThoseOfTheDocumentsAlone) {
  constexpr int64_t kLength = 131;
  const Shape q = {1, kLength, 4, 24}, kv = {1, kLength, 2, 24};
  const std::vector<Tensor> qkvd = {normal(q, 1), normal(kv, 2), normal(kv, 3), normal(q, 4)};
  const std::vector<int64_t> borders = {0, 1, 2, 40, 41, 108, kLength};
  std::vector<Segment> documents;
  for (size_t i = 0; i + 1 < borders.size(); ++i) documents.push_back({borders[i], borders[i + 1], borders[i], borders[i + 1]});
  const auto packed = attend(qkvd, 0, kLength, Segments({documents}, 1, kLength, kLength, at::kCPU));
  for (const Segment& document : documents) {
    const auto alone = attend(qkvd, document.q_begin, document.q_end, {});
    for (size_t i = 0; i < alone.size(); ++i) {
      const Tensor ours = packed[i].narrow(1, document.q_begin, document.queries());
      EXPECT_LE((ours - alone[i]).abs().max().item<double>(), 1e-5) << "tensor " << i << " of the document at " << document.q_begin;
    }
  }
}

// What context parallelism makes of it: the queries in two stretches, all keys there. Same numbers, in other parts.
TEST(Attention, PartsOfTheQueriesAreThePartsOfTheWhole) {
  const Tensor q = normal({2, 32, 4, 16}, 1), k = normal({2, 32, 2, 16}, 2), v = normal({2, 32, 2, 16}, 3);
  const Unrecorded guard;
  const Tensor whole = attention(q, k, v).out_BSHD;
  for (int64_t rank = 0; rank < 2; ++rank) {
    const int64_t early = 8 * rank, late = 8 * (3 - rank);
    const Tensor mine = at::cat({q.narrow(1, early, 8), q.narrow(1, late, 8)}, 1);
    const Segments segments({{{0, 8, 0, early + 8}, {8, 16, 0, late + 8}}}, 2, 16, 32, at::kCPU);
    const Tensor expected = at::cat({whole.narrow(1, early, 8), whole.narrow(1, late, 8)}, 1);
    EXPECT_LE(distance(attention(mine, k, v, segments).out_BSHD, expected), 1e-6);
  }
}

// What needs the queries' own positions alone may be made before the other keys are there: the same bits, and it is not made again.
TEST(Attention, GoesOnFromItsOwnPositions) {
  const Tensor k = normal({2, 32, 2, 16}, 2), v = normal({2, 32, 2, 16}, 3), d = normal({2, 16, 4, 16}, 4);
  for (int64_t rank = 0; rank < 2; ++rank) {
    const int64_t early = 8 * rank, late = 8 * (3 - rank);
    const Segments segments({{{0, 8, 0, early + 8}, {8, 16, 0, late + 8}}}, 2, 16, 32, at::kCPU);
    const auto own = [&](const Tensor& x) { return at::cat({x.narrow(1, early, 8), x.narrow(1, late, 8)}, 1); };
    const auto run = [&](bool ahead, double factor) {
      std::vector<Tensor> x = {normal({2, 16, 4, 16}, 1).requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()};
      std::vector<Dense> made;
      if (ahead) made = attend_own(x[0].detach(), own(k), own(v), segments);
      for (Dense& square : made) square.out_BHSD = square.out_BHSD * factor;
      const Tensor out = attention(x[0], x[1], x[2], segments, AttentionKernel::automatic, made).out_BSHD;
      run_backward(out, d);
      return std::vector<Tensor>{out.detach(), x[0].grad(), x[1].grad(), x[2].grad()};
    };
    const auto whole = run(false, 1.0), ahead = run(true, 1.0);
    for (size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(ahead[i].equal(whole[i])) << "tensor " << i;
    EXPECT_FALSE(run(true, 2.0)[0].equal(whole[0]));
  }
  EXPECT_TRUE(attend_own(k, k, v, {}).empty()) << "a whole sequence is one's own";
}

TEST(Segments, AsRows) {
  EXPECT_TRUE(Segments().plain());
  const Segments documents({{{0, 2, 0, 2}, {2, 5, 2, 5}}, {{0, 5, 0, 5}}}, 2, 5, 5, at::kCPU);
  EXPECT_FALSE(documents.plain());
  EXPECT_TRUE(documents.keys_in_place());
  EXPECT_TRUE(documents.rows().q_ends.equal(at::tensor({0, 2, 5, 10}, at::kInt)));
  EXPECT_TRUE(documents.rows().k_ends.equal(at::tensor({0, 2, 5, 10}, at::kInt)));
  EXPECT_EQ(documents.rows().longest_q, 5);
  const Segments context({{{0, 2, 0, 2}, {2, 4, 0, 8}}}, 2, 4, 8, at::kCPU);
  EXPECT_FALSE(context.keys_in_place());
  EXPECT_TRUE(context.rows().k_ends.equal(at::tensor({0, 2, 10, 12, 20}, at::kInt)));
  EXPECT_EQ(context.rows().keys, (std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {0, 10}, {8, 16}}));
  EXPECT_EQ(context.rows().longest_k, 8);
}

TEST(Segments, MustCoverTheQueries) {
  const auto refused = [](std::vector<std::vector<Segment>> lists) {
    EXPECT_THROW(Segments(std::move(lists), 3, 4, 6, at::kCPU), std::logic_error);
  };
  refused({{{0, 3, 0, 3}}});                  // a query left out
  refused({{{0, 2, 0, 2}, {3, 4, 3, 4}}});    // in the middle
  refused({{{0, 4, 3, 6}}});                  // more queries than keys
  refused({{{0, 4, 3, 7}}});                  // keys that are not there
  refused({{{0, 4, 0, 4}}, {{0, 4, 0, 4}}});  // two lists for three sequences
  refused({});
}

TEST(Attention, OnePositionSeesItself) {
  const Tensor q = normal({2, 1, 4, 6}, 1).requires_grad_(), k = normal({2, 1, 2, 6}, 2).requires_grad_();
  const Tensor v = normal({2, 1, 2, 6}, 3).requires_grad_(), dy = normal({2, 1, 4, 6}, 4);
  const Tensor out = attention(q, k, v).out_BSHD;
  EXPECT_TRUE(out.equal(v.repeat_interleave(2, 2)));
  run_backward(out, dy);
  EXPECT_LE(distance(v.grad(), dy.view({2, 1, 2, 2, 6}).sum(3)), 1e-6);
  EXPECT_LE(q.grad().abs().max().item<double>(), 1e-6);
  EXPECT_LE(k.grad().abs().max().item<double>(), 1e-6);
}

TEST(Attention, TakesViewsOfOneQkv) {
  const Shape qkv = {2, 5, 8, 6};  // 4 heads of q, 2 of k, 2 of v
  const auto parts = [](const Tensor& x) { return std::vector<Tensor>{x.narrow(2, 0, 4), x.narrow(2, 4, 2), x.narrow(2, 6, 2)}; };
  expect_matches({{qkv}, {}, 3, 2e-6},
                 [&](const auto& x, auto&) {
                   const auto p = parts(x[0]);
                   return attention(p[0], p[1], p[2]).out_BSHD;
                 },
                 [&](const auto& x, const auto&) {
                   const auto p = parts(x[0]);
                   return head_by_head(p[0], p[1], p[2]);
                 });
}

}  // namespace
}  // namespace upcycle
