#include "moe/router.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/autograd.hpp"
#include "ops/uniform.hpp"
#include "support/numbers.hpp"

// Shapes: T tokens, K choices of each, E experts, D width.
namespace upcycle {
namespace {

const Communicator alone;

/// By value, then by the lower index: a stable sort, number by number.
Tensor best_of(const Tensor& logits_TE, int64_t top_k) {
  Tensor out = at::empty({logits_TE.size(0), top_k}, at::kLong);
  for (int64_t t = 0; t < logits_TE.size(0); ++t) {
    std::vector<float> logits;
    for (int64_t e = 0; e < logits_TE.size(1); ++e) logits.push_back(logits_TE[t][e].item<float>());
    std::vector<int64_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    for (int64_t k = 0; k < top_k; ++k) out[t][k] = order[k];
  }
  return out;
}

TEST(ChooseExperts, FollowsOneTotalOrder) {
  for (const auto& [experts, top_k] : {std::pair{8, 2}, {64, 8}, {128, 8}, {5, 5}, {1, 1}, {7, 1}}) {
    const Tensor smooth = normal({33, experts}, 1);
    const Tensor coarse = (smooth * 2).round() / 2;  // few values, both zeros: ties everywhere
    for (const Tensor& logits : {smooth, coarse, smooth * 1e-38, smooth * 1e38, -smooth.abs() - 1, at::zeros({33, experts})}) {
      EXPECT_TRUE(choose_experts(logits, top_k).equal(best_of(logits, top_k))) << experts << " experts, top " << top_k;
    }
  }
}

TEST(ChooseExperts, BothZerosAreOneValue) {
  const Tensor logits = at::tensor({-0.0F, 0.0F, -0.0F, 0.0F, -1e-45F, 1e-45F}).view({1, 6});
  EXPECT_TRUE(choose_experts(logits, 6).equal(at::tensor({5, 0, 1, 2, 3, 4}, at::kLong).view({1, 6})));
}

TEST(ChooseExperts, InfinitiesAreNumbersToo) {
  const Tensor logits = at::tensor({-INFINITY, 1.0F, INFINITY, -3.4e38F, 3.4e38F}).view({1, 5});
  EXPECT_TRUE(choose_experts(logits, 5).equal(at::tensor({2, 4, 1, 3, 0}, at::kLong).view({1, 5})));
}

// 4 copies of 2 shards, rows tied inside a copy and copies 1 and 3 tied with each other: whole copies win, the lower one first.
TEST(ChooseExperts, TiesBetweenCopiesTakeWholeCopies) {
  const Tensor logits = at::tensor({1.0F, 1.0F, 2.0F, 2.0F, 0.0F, 0.0F, 2.0F, 2.0F}).view({1, 8});
  EXPECT_TRUE(choose_experts(logits, 2).equal(at::tensor({2, 3}, at::kLong).view({1, 2})));
  EXPECT_TRUE(choose_experts(logits, 4).equal(at::tensor({2, 3, 6, 7}, at::kLong).view({1, 4})));
}

TEST(ChooseExperts, TakesNoTokensAndStridedLogits) {
  EXPECT_EQ(choose_experts(at::zeros({0, 8}), 2).sizes(), (Shape{0, 2}));
  const Tensor strided = normal({8, 5}, 1).t();
  EXPECT_TRUE(choose_experts(strided, 3).equal(best_of(strided, 3)));
}

struct Losses {
  Tensor weight_TK, aux, z;
};

/// The formulas in fp64 for given choices, differentiated by ATen.
Losses formula(const Tensor& x64, const Tensor& w64, const Tensor& expert_TK, bool renormalise) {
  const Tensor logits = at::matmul(x64, w64.t()), probability = at::softmax(logits, -1);
  const Tensor chosen = probability.gather(1, expert_TK);
  std::vector<Tensor> share;
  for (int64_t e = 0; e < w64.size(0); ++e) share.push_back(expert_TK.eq(e).sum().to(at::kDouble) / expert_TK.numel());
  return {renormalise ? chosen / chosen.sum(1, true) : chosen, (at::stack(share) * probability.mean(0)).sum() * w64.size(0),
          at::logsumexp(logits, {1}).square().mean()};
}

TEST(Router, WeightsLossesAndTheirGradients) {
  for (const bool renormalise : {true, false}) {
    for (const BalanceLoss balance : {BalanceLoss{}, {.aux = 0.7}, {.z = 0.3}, {.aux = 0.7, .z = 0.3}}) {
      SCOPED_TRACE(testing::Message() << "renormalise " << renormalise << ", aux " << balance.aux << ", z " << balance.z);
      Parameter weight = trained(normal({9, 5}, 1));
      Router router(weight, alone, {.top_k = 3, .renormalise = renormalise});
      const Tensor x = normal({17, 5}, 2).requires_grad_(), dy = normal({17, 3}, 3);
      const Routing routing = router.forward(x, {.balance = balance});
      run_backward(routing.weight_TK, dy);

      const Tensor x64 = x.detach().to(at::kDouble).requires_grad_(), w64 = weight.value.to(at::kDouble).requires_grad_();
      const Losses expected = formula(x64, w64, routing.expert_TK, renormalise);
      torch::autograd::backward({(expected.weight_TK * dy).sum() + expected.aux * balance.aux + expected.z * balance.z}, {});
      EXPECT_LE(distance(routing.weight_TK, expected.weight_TK), 1e-6);
      EXPECT_LE(distance(x.grad(), x64.grad()), 1e-5);
      EXPECT_LE(distance(weight.main_grad, w64.grad()), 1e-5);
      EXPECT_EQ(weight.additions, 1);
      const Tensor losses = at::stack({expected.aux.detach(), expected.z.detach()});
      EXPECT_LE(distance(router.statistics().measures_3.narrow(0, 0, 2), losses), 1e-6);
    }
  }
}

TEST(Router, ChoosesByItsLogitsAndCounts) {
  Parameter weight = trained(normal({6, 5}, 1));
  Router router(weight, alone, {.top_k = 2});
  const Tensor x = normal({40, 5}, 2);
  const Routing routing = router.forward(x, {});
  EXPECT_TRUE(routing.expert_TK.equal(best_of(router.logits(x), 2)));
  EXPECT_EQ(routing.weight_TK.scalar_type(), at::kFloat);
  for (int64_t e = 0; e < 6; ++e) EXPECT_EQ(routing.count_E[e].item<int64_t>(), routing.expert_TK.eq(e).sum().item<int64_t>());
}

TEST(Router, AuxIsOneAtBalance) {
  // Token t prefers expert t, all alike.
  Parameter weight = trained(at::zeros({8, 8}));
  for (int64_t e = 0; e < 8; ++e) weight.value[e][e].fill_(3.0);
  const Tensor one_of_each = weight.value / 3.0;
  Router router(weight, alone, {.top_k = 1});
  router.forward(one_of_each, {.balance = {.aux = 1.0}});
  EXPECT_NEAR(router.statistics().measures_3[0].item<double>(), 1.0, 1e-6);
  // All tokens at one expert: E times its mean probability.
  router.reset_statistics();
  router.forward(one_of_each.narrow(0, 2, 1).expand({5, 8}), {.balance = {.aux = 1.0}});
  EXPECT_NEAR(router.statistics().measures_3[0].item<double>(), 8.0 * std::exp(3.0) / (std::exp(3.0) + 7.0), 1e-5);
}

// The balance losses have their gradient even where the loss does not depend on the weights.
TEST(Router, BalanceGradientsComeWithoutAnyOther) {
  Parameter weight = trained(normal({6, 5}, 1)), once = trained(weight.value);
  Router router(weight, alone, {.top_k = 2}), reference(once, alone, {.top_k = 2});
  const Tensor x = normal({40, 5}, 2);
  run_backward(router.forward(x, {.balance = {.aux = 0.5}}).weight_TK, at::zeros({40, 2}));
  EXPECT_GT(weight.main_grad.norm().item<double>(), 1e-4);
  run_backward(reference.forward(x, {.balance = {.aux = 0.5}}).weight_TK * 1000, at::zeros({40, 2}));  // no scale of the outside reaches it
  EXPECT_TRUE(weight.main_grad.equal(once.main_grad));
}

TEST(Router, StatisticsAreSumsOverWhatIsTrained) {
  Parameter weight = trained(normal({6, 5}, 1));
  Router router(weight, alone, {.top_k = 2});
  const Tensor a = normal({40, 5}, 2), b = normal({7, 5}, 3);
  const Tensor count = router.forward(a, {}).count_E + router.forward(b, {}).count_E;
  {
    const Unrecorded guard;
    router.forward(a, {});
  }
  EXPECT_TRUE(router.statistics().count_E.equal(count));
  EXPECT_EQ(count.sum().item<int64_t>(), 94);
  router.reset_statistics();
  EXPECT_FALSE(router.statistics().count_E.defined());
}

// A rounded logit is a tie, and a tie another expert.
TEST(Router, ComputesInFp32WhateverTheActivationsAre) {
  Parameter weight = trained(normal({64, 32}, 1));
  Router router(weight, alone, {.top_k = 8});
  const Tensor x = normal({100, 32}, 2, at::kBFloat16).requires_grad_();
  const Tensor logits = router.logits(x);
  EXPECT_EQ(logits.scalar_type(), at::kFloat);
  EXPECT_LE(distance(logits, at::matmul(x.detach().to(at::kDouble), weight.value.to(at::kDouble).t())), 1e-6);
  run_backward(router.forward(x, {}).weight_TK, normal({100, 8}, 3));
  EXPECT_EQ(x.grad().scalar_type(), at::kBFloat16);
}

// A layer that is computed again: the first pass records nothing, the second gets its choice. Losses and counts come once.
TEST(Router, ASavedChoiceIsNotMadeAgain) {
  Parameter weight = trained(normal({6, 5}, 1)), once = trained(weight.value);
  Router router(weight, alone, {.top_k = 2}), reference(once, alone, {.top_k = 2});
  const Tensor x = normal({40, 5}, 2).requires_grad_(), same = x.detach().requires_grad_(), dy = normal({40, 2}, 3);
  RouterContext context{.balance = {.aux = 0.5, .z = 0.1}};
  const Routing expected = reference.forward(same, context);
  run_backward(expected.weight_TK, dy);
  {
    const Unrecorded guard;
    context.expert_TK = router.forward(x, context).expert_TK;
  }
  EXPECT_FALSE(router.statistics().count_E.defined());
  weight.value.neg_();   // it would choose others now
  const Tensor saved = context.expert_TK.clone();
  EXPECT_TRUE(router.forward(x, context).expert_TK.equal(saved));
  weight.value.neg_();
  router.reset_statistics();
  const Routing again = router.forward(x, context);
  run_backward(again.weight_TK, dy);
  EXPECT_TRUE(again.weight_TK.equal(expected.weight_TK));
  EXPECT_TRUE(again.count_E.equal(expected.count_E));
  EXPECT_TRUE(router.statistics().count_E.equal(reference.statistics().count_E));
  EXPECT_TRUE(router.statistics().measures_3.equal(reference.statistics().measures_3));
  EXPECT_TRUE(weight.main_grad.equal(once.main_grad));
  EXPECT_TRUE(x.grad().equal(same.grad()));
}

TEST(Router, ABiasChoosesAndDoesNotWeigh) {
  for (const bool renormalise : {true, false}) {
    Parameter weight = trained(normal({6, 5}, 1)), plain = trained(weight.value);
    Router router(weight, alone, {.top_k = 2, .renormalise = renormalise}), reference(plain, alone, {.top_k = 2, .renormalise = renormalise});
    router.state().bias_E = at::tensor({0.0, 100.0, 0.0, 0.0, -100.0, 0.0}).to(at::kFloat);
    const Tensor x = normal({40, 5}, 2), dy = normal({40, 2}, 3);
    const Routing routing = router.forward(x, {.balance = {.aux = 0.5}});
    EXPECT_TRUE(routing.expert_TK.select(1, 0).eq(1).all().item<bool>());
    EXPECT_FALSE(routing.expert_TK.eq(4).any().item<bool>());
    EXPECT_TRUE(routing.expert_TK.equal(best_of(router.logits(x) + router.state().bias_E, 2)));
    // Given the choice, weights, losses and gradients know of no bias.
    const Routing unbiased = reference.forward(x, {.balance = {.aux = 0.5}, .expert_TK = routing.expert_TK});
    EXPECT_TRUE(routing.weight_TK.equal(unbiased.weight_TK));
    run_backward(routing.weight_TK, dy);
    run_backward(unbiased.weight_TK, dy);
    EXPECT_TRUE(weight.main_grad.equal(plain.main_grad));
    // A bias of zeros is none, bit for bit; whole copies go on winning ties.
    router.state().bias_E = at::zeros({6});
    reference.state() = {};
    EXPECT_TRUE(router.forward(x, {}).expert_TK.equal(reference.forward(x, {}).expert_TK));
  }
  Parameter tied = trained(normal({4, 5}, 1).repeat_interleave(2, 0));   // 4 copies of 2 shards
  Router granular(tied, alone, {.top_k = 4});
  granular.state().bias_E = at::tensor({0.5, -0.25, 0.0, 1.0}).to(at::kFloat).repeat_interleave(2);
  const Tensor expert = granular.forward(normal({40, 5}, 2), {}).expert_TK.view({40, 2, 2});
  EXPECT_TRUE((expert.select(2, 0) + 1).equal(expert.select(2, 1)));
}

TEST(Router, JitterShakesWhatTheRouterSeesAndIsTheTokensOwn) {
  Parameter weight = trained(normal({6, 5}, 1));
  Router router(weight, alone, {.top_k = 2, .renormalise = false, .layer = 3});
  const Tensor x = normal({40, 5}, 2).requires_grad_(), token = at::arange(100, 140, at::kLong), dy = normal({40, 2}, 3);
  const RouterContext context{.jitter = {0.25, 7}, .token_T = token};
  const Routing routing = router.forward(x, context);
  // The same by hand: each element times 1 + 0.25 * U[-1, 1).
  const Tensor noise = 0.75 + 0.5 * uniform(Random(7, "model.layers.3.mlp.gate/jitter"), token, 5);
  Parameter same = trained(weight.value);
  Router plain(same, alone, {.top_k = 2, .renormalise = false});
  const Tensor shaken = (x.detach() * noise).requires_grad_();
  const Routing expected = plain.forward(shaken, {});
  EXPECT_TRUE(routing.expert_TK.equal(expected.expert_TK));
  EXPECT_FALSE(routing.expert_TK.equal(plain.forward(x, {}).expert_TK));
  EXPECT_LE(distance(routing.weight_TK, expected.weight_TK), 1e-6);
  run_backward(routing.weight_TK, dy);
  run_backward(expected.weight_TK, dy);
  EXPECT_LE(distance(weight.main_grad, same.main_grad), 1e-6);
  EXPECT_LE(distance(x.grad(), shaken.grad() * noise), 1e-6);
  // A part of the tokens alone, as on another rank.
  const Routing part = router.forward(x.narrow(0, 10, 20), {.jitter = {0.25, 7}, .token_T = token.narrow(0, 10, 20)});
  EXPECT_TRUE(part.expert_TK.equal(routing.expert_TK.narrow(0, 10, 20)));
  Router other(weight, alone, {.top_k = 2, .renormalise = false, .layer = 4});
  EXPECT_GT(distance(other.forward(x, context).weight_TK, routing.weight_TK), 1e-3);
}

}  // namespace
}  // namespace upcycle
