#include "moe/balance_loss.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <cmath>

#include "moe/router.hpp"
#include "ops/permute.hpp"
#include "support/numbers.hpp"

// Shapes: T tokens, K choices of each, E experts, B sequences of S positions.
namespace upcycle {
namespace {

const Communicator nobody_else;

constexpr std::array kScopes = {BalanceScope::batch, BalanceScope::sequence, BalanceScope::global};

Tensor sequences_of(int64_t sequences, int64_t positions) { return at::arange(sequences, at::kLong).repeat_interleave(positions); }

Measures measure_logits(const BalanceLoss& loss, const Tensor& logits_TE, const Tensor& expert_TK, const Tensor& last_E = {}) {
  return measure(nobody_else, loss, logits_TE, at::softmax(logits_TE, -1), expert_TK, count_choices(expert_TK, logits_TE.size(1)), last_E);
}

// 2 sequences of 2 tokens, 2 experts, probabilities 3/4 and 1/4. Sequence 0 chooses expert 0 twice, sequence 1 each expert once.
TEST(BalanceLoss, ValuesByHand) {
  const double a = std::log(3.0);
  const Tensor logits = at::tensor({a, 0.0, a, 0.0, a, 0.0, 0.0, a}).to(at::kFloat).view({4, 2});
  const Tensor expert = at::tensor({0, 0, 0, 1}, at::kLong).view({4, 1});
  const auto aux = [&](const BalanceLoss& loss, const Tensor& last_E = {}) {
    return measure_logits(loss, logits, expert, last_E).aux.item<double>();
  };
  // Shares 3/4, 1/4; mean probabilities (3 * 3/4 + 1/4) / 4 = 5/8 and 3/8.
  EXPECT_NEAR(aux({.scope = BalanceScope::batch}), 2 * (0.75 * 5 / 8 + 0.25 * 3 / 8), 1e-6);
  // Sequence 0: shares 1, 0 and probabilities 3/4, 1/4: 3/2. Sequence 1: 1/2 each: 1.
  EXPECT_NEAR(aux({.scope = BalanceScope::sequence, .sequences = 2, .sequence_T = sequences_of(2, 2)}), (1.5 + 1.0) / 2, 1e-6);
  // Before the first step all is balanced; then the shares of the last one count: 1/10, 9/10.
  EXPECT_NEAR(aux({.scope = BalanceScope::global}), 1.0, 1e-6);
  EXPECT_NEAR(aux({.scope = BalanceScope::global}, at::tensor({5, 45}, at::kLong)), 2 * (0.1 * 5 / 8 + 0.9 * 3 / 8), 1e-6);

  const Measures measures = measure_logits({}, logits, expert);
  EXPECT_NEAR(measures.z.item<double>(), std::pow(std::log(4.0), 2), 1e-6);
  EXPECT_NEAR(measures.entropy.item<double>(), -(0.75 * std::log(0.75) + 0.25 * std::log(0.25)), 1e-6);
}

TEST(BalanceLoss, AuxIsOneAtBalanceAndEntropyLogE) {
  const Tensor logits = at::zeros({24, 8}), expert = at::arange(48, at::kLong).remainder(8).view({24, 2});
  for (const BalanceScope scope : kScopes) {
    const Measures measures = measure_logits({.scope = scope, .sequences = 3, .sequence_T = sequences_of(3, 8)}, logits, expert,
                                             at::full({8}, 6, at::kLong));
    EXPECT_NEAR(measures.aux.item<double>(), 1.0, 1e-6);
    EXPECT_NEAR(measures.entropy.item<double>(), std::log(8.0), 1e-6);
  }
}

/// The formulas in fp64, sequence by sequence, differentiated by ATen.
Tensor aux64(BalanceScope scope, const Tensor& probability_TE, const Tensor& expert_TK, int64_t sequences, const Tensor& last_E) {
  const int64_t experts = probability_TE.size(1);
  const auto loss = [&](const Tensor& probability, const Tensor& choice, const Tensor& count_E) {
    std::vector<Tensor> share;
    for (int64_t e = 0; e < experts; ++e) {
      share.push_back(count_E.defined() ? count_E[e].to(at::kDouble) / count_E.sum() : choice.eq(e).sum().to(at::kDouble) / choice.numel());
    }
    return (at::stack(share) * probability.mean(0)).sum() * experts;
  };
  if (scope != BalanceScope::sequence) return loss(probability_TE, expert_TK, scope == BalanceScope::global ? last_E : Tensor());
  const int64_t length = probability_TE.size(0) / sequences;
  std::vector<Tensor> losses;
  for (int64_t b = 0; b < sequences; ++b) {
    losses.push_back(loss(probability_TE.narrow(0, b * length, length), expert_TK.narrow(0, b * length, length), {}));
  }
  return at::stack(losses).mean();
}

TEST(BalanceLoss, ValuesAndGradientsAreThoseOfTheFormula) {
  const Tensor last_E = at::arange(1, 10, at::kLong);
  for (const BalanceScope scope : kScopes) {
    SCOPED_TRACE(static_cast<int>(scope));
    const Tensor logits = (normal({24, 9}, 1) * 2).requires_grad_(), logits64 = logits.detach().to(at::kDouble).requires_grad_();
    const Tensor expert = choose_experts(logits, 3);
    const BalanceLoss loss{.scope = scope, .sequences = 3, .sequence_T = sequences_of(3, 8)};
    const Measures measures = measure_logits(loss, logits, expert, last_E);
    const Tensor expected = aux64(scope, at::softmax(logits64, -1), expert, 3, last_E);
    EXPECT_GT(std::abs(expected.item<double>() - 1), 0.01);
    EXPECT_NEAR(measures.aux.item<double>(), expected.item<double>(), 1e-6);
    const Tensor log64 = at::log_softmax(logits64.detach(), -1);
    EXPECT_NEAR(measures.entropy.item<double>(), -(log64.exp() * log64).sum(1).mean().item<double>(), 1e-6);
    EXPECT_FALSE(measures.entropy.requires_grad());
    torch::autograd::backward({measures.aux}, {});
    torch::autograd::backward({expected}, {});
    EXPECT_LE(distance(logits.grad(), logits64.grad()), 1e-5);
  }
}

TEST(BalanceLoss, ABiasMovesAgainstTheLoadByItsRate) {
  const Tensor bias = at::tensor({0.5, 0.0, -0.25, 0.0}).to(at::kFloat), count = at::tensor({10, 3, 4, 7}, at::kLong);   // mean 6
  const Tensor moved = moved_bias(bias, count, 0.125, at::full({}, true));
  EXPECT_TRUE(moved.equal(at::tensor({0.375, 0.125, -0.125, -0.125}).to(at::kFloat)));
  EXPECT_TRUE(moved_bias(bias, at::tensor({6, 6, 5, 7}, at::kLong), 0.125, at::full({}, true))
                  .equal(at::tensor({0.5, 0.0, -0.125, -0.125}).to(at::kFloat)));   // exactly the mean: stays
  EXPECT_TRUE(moved_bias(bias, count, 0.125, at::full({}, false)).equal(bias));
}

}  // namespace
}  // namespace upcycle
