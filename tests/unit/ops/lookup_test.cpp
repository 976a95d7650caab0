// embedding, cross_entropy
#include <ATen/ops/embedding.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>

#include <cmath>

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

/// Of all tokens weight * -log softmax, and by ATen's own backward its gradient; in fp64.
struct Formula64 {
  Tensor loss_T, gradient_TV;
  Formula64(const Tensor& logits, const Tensor& labels, const Tensor& weight) {
    const Tensor x = logits.to(at::kDouble).requires_grad_();
    const Tensor loss = at::log_softmax(x, -1).gather(1, labels.unsqueeze(1)).squeeze(1).neg() * weight.to(at::kDouble);
    loss.sum().backward();
    loss_T = loss.detach(), gradient_TV = x.grad();
  }
};

TEST(CrossEntropy, IsMinusLogSoftmaxAndLeavesItsGradient) {
  const Tensor labels = at::tensor({0, 36, 5, 5, 17}, at::kLong), weight = at::tensor({0.5F, 2.0F, 0.0F, 1.0F, -3.0F});
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Tensor x = normal({5, 37}, 1).mul_(4).to(dtype);
    const Formula64 expected(x, labels, weight);
    const Tensor loss = cross_entropy(x, labels, weight);
    EXPECT_EQ(loss.scalar_type(), at::kFloat);
    EXPECT_EQ(x.scalar_type(), dtype);
    EXPECT_LE(distance(loss, expected.loss_T), 1e-6) << "computed in fp32 whatever the logits are";
    EXPECT_LE(distance(x, expected.gradient_TV), dtype == at::kFloat ? 1e-6 : 0x1p-8);
  }
  Tensor nothing = at::zeros({0, 37});
  EXPECT_EQ(cross_entropy(nothing, at::zeros({0}, at::kLong), at::zeros({0})).numel(), 0);
}

TEST(CrossEntropy, StaysFiniteFarOut) {
  Tensor logits = at::tensor({1e4F, -1e4F, 0.0F}).view({1, 3});
  EXPECT_EQ(cross_entropy(logits, at::tensor({1}, at::kLong), at::ones({1})).item<float>(), 2e4F);
  EXPECT_TRUE(logits.equal(at::tensor({1.0F, -1.0F, 0.0F}).view({1, 3})));
}

// Labels that are not learned: whatever the model says there, also nothing at all.
TEST(CrossEntropy, OfWeightZeroIsZero) {
  Tensor logits = at::tensor({NAN, 1.0F, INFINITY, 2.0F, 0.0F, 1.0F}).view({3, 2});
  const Tensor labels = at::tensor({0, 0, 1}, at::kLong), weight = at::tensor({0.0F, 0.0F, 1.0F});
  const Tensor loss = cross_entropy(logits, labels, weight);
  EXPECT_TRUE(loss.narrow(0, 0, 2).equal(at::zeros({2})));
  EXPECT_TRUE(logits.narrow(0, 0, 2).equal(at::zeros({2, 2})));
  EXPECT_NEAR(loss[2].item<float>(), std::log(1 + std::exp(-1.0)), 1e-6);
}

TEST(CrossEntropy, OfNotANumberIsNone) {
  Tensor logits = at::tensor({NAN, 1.0F, 0.0F, 1.0F}).view({2, 2});
  const Tensor loss = cross_entropy(logits, at::tensor({1, 1}, at::kLong), at::ones({2}));
  EXPECT_TRUE(std::isnan(loss[0].item<float>()));
  EXPECT_TRUE(std::isfinite(loss[1].item<float>()));
  EXPECT_TRUE(logits[0].isnan().all().item<bool>());
}

// What ranks that share a vocabulary do: sums of parts, scaled to the largest of all.
TEST(CrossEntropy, OfPartsOfTheColumns) {
  const Tensor labels = at::tensor({0, 36, 5, 12, 20}, at::kLong), weight = at::tensor({0.5F, 2.0F, 0.25F, 1.0F, 3.0F});
  const Tensor x = normal({5, 37}, 1).mul_(4);
  const Formula64 expected(x, labels, weight);
  const std::vector<std::pair<int64_t, int64_t>> parts = {{0, 12}, {12, 24}, {36, 1}};
  SoftmaxSums whole{at::zeros({5}) - 1e30, at::zeros({5}), at::zeros({5})};
  std::vector<SoftmaxSums> sums;
  for (const auto& [first, size] : parts) {
    sums.push_back(softmax_sums(x.narrow(1, first, size), labels, first));
    whole.largest_T = whole.largest_T.maximum(sums.back().largest_T);
  }
  for (const SoftmaxSums& part : sums) {
    whole.sum_T += part.sum_T * (part.largest_T - whole.largest_T).exp();
    whole.label_T += part.label_T;
  }
  EXPECT_LE(distance(weighted_losses(whole, weight), expected.loss_T), 1e-6);
  for (const auto& [first, size] : parts) {
    Tensor part = x.narrow(1, first, size).clone();
    cross_entropy_gradient(part, labels, weight, whole, first);
    EXPECT_LE(distance(part, expected.gradient_TV.narrow(1, first, size)), 1e-6) << first;
  }
}

}  // namespace
}  // namespace upcycle
