// embedding, cross_entropy
#include <ATen/ops/embedding.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>

#include "ops/cross_entropy.hpp"
#include "ops/embedding.hpp"
#include "unit/ops/reference.hpp"

namespace upcycle {
namespace {

TEST(Embedding, TakesRowsAndAddsGradientsOfRepeatedIds) {
  const Tensor ids = at::tensor({3, 0, 3, 3, 10, 0}, at::kLong).view({2, 3});
  expect_matches({{}, {{11, 5}}}, [&](const auto&, auto& w) { return embedding(ids, w[0]); },
                 [&](const auto&, const auto& w) { return at::embedding(w[0], ids); });
}

TEST(Embedding, TakesNoIds) {
  Parameter weight = trained(normal({11, 5}, 1));
  const Tensor y = embedding(at::zeros({2, 0}, at::kLong), weight);
  run_backward(y, at::zeros({2, 0, 5}));
  EXPECT_EQ(y.sizes(), (Shape{2, 0, 5}));
  EXPECT_EQ(weight.main_grad.abs().sum().item<float>(), 0.0F);
}

// 600 times the same id: in bf16 the sum would stop at 256.
TEST(Embedding, SumsInFp32) {
  Parameter weight = trained(normal({3, 1}, 1, at::kBFloat16));
  const Tensor y = embedding(at::zeros({600}, at::kLong).add_(2), weight);
  run_backward(y, at::zeros({600, 1}, at::kBFloat16).add_(1.0));
  EXPECT_EQ(weight.main_grad.select(0, 2).item<float>(), 600.0F);
}

Tensor minus_log_softmax(const Tensor& logits, const Tensor& labels) {
  return at::log_softmax(logits, -1).gather(1, labels.unsqueeze(1)).squeeze(1).neg();
}

TEST(CrossEntropy, IsMinusLogSoftmax) {
  const Tensor labels = at::tensor({0, 36, 5, 5, 17}, at::kLong);
  expect_matches({{{5, 37}}, {}, 1}, [&](const auto& x, auto&) { return cross_entropy(x[0] * 4, labels); },
                 [&](const auto& x, const auto&) { return minus_log_softmax(x[0] * 4, labels); });
  const Tensor nobody = at::zeros({0}, at::kLong);
  expect_matches({{{0, 37}}, {}, 1}, [&](const auto& x, auto&) { return cross_entropy(x[0], nobody); },
                 [&](const auto& x, const auto&) { return minus_log_softmax(x[0], nobody); });
}

TEST(CrossEntropy, StaysFiniteFarOut) {
  const Tensor logits = at::tensor({1e4F, -1e4F, 0.0F}).view({1, 3}).requires_grad_();
  const Tensor loss = cross_entropy(logits, at::tensor({1}, at::kLong));
  EXPECT_EQ(loss.item<float>(), 2e4F);
  run_backward(loss, at::zeros({1}).add_(1.0));
  EXPECT_TRUE(logits.grad().equal(at::tensor({1.0F, -1.0F, 0.0F}).view({1, 3})));
}

TEST(CrossEntropy, IsFp32ForBf16Logits) {
  const Tensor logits = normal({3, 8}, 1, at::kBFloat16), labels = at::tensor({1, 2, 3}, at::kLong);
  const Tensor loss = cross_entropy(logits, labels);
  EXPECT_EQ(loss.scalar_type(), at::kFloat);
  EXPECT_LE(distance(loss, minus_log_softmax(logits.to(at::kDouble), labels)), 1e-6);
}

}  // namespace
}  // namespace upcycle
