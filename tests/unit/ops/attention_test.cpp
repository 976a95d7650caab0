#include "ops/attention.hpp"

#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>

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

void expect_attention(Attended (*op)(const Tensor&, const Tensor&, const Tensor&), int roundings) {
  for (const Form& f : kForms) {
    SCOPED_TRACE(testing::Message() << f.length << " positions, " << f.heads << "/" << f.groups << " heads of " << f.width);
    const Shape q = {f.batch, f.length, f.heads, f.width}, kv = {f.batch, f.length, f.groups, f.width};
    expect_matches({{q, kv, kv}, {}, roundings, 2e-6}, [&](const auto& x, auto&) { return op(x[0], x[1], x[2]).out_BSHD; },
                   [](const auto& x, const auto&) { return head_by_head(x[0], x[1], x[2]); });
  }
}

TEST(Attention, FlashIsTheFormula) { expect_attention(&attention, 3); }  // scores and probabilities are rounded, too
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
