#include "train/choose_token.hpp"

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "base/rng.hpp"

namespace upcycle {
namespace {

constexpr int64_t kDraws = 200000;

/// How often each token comes in kDraws draws.
std::map<int64_t, int64_t> draw(const Tensor& logits, const TokenChoice& choice, uint64_t seed = 5) {
  const Random random(seed, "sample/0");
  std::map<int64_t, int64_t> count;
  for (int64_t i = 0; i < kDraws; ++i) ++count[choose_token(logits, choice, random.uniform(static_cast<uint64_t>(i)))];
  return count;
}

/// Pearson's statistic against exact probabilities. Tokens without probability must never come.
double chi_square(const std::map<int64_t, int64_t>& count, const std::map<int64_t, double>& probability) {
  for (const auto& [token, times] : count) EXPECT_TRUE(probability.contains(token)) << "token " << token << " came " << times << " times";
  double sum = 0.0, all = 0.0;
  for (const auto& [token, p] : probability) {
    const double expected = p * kDraws, seen = count.contains(token) ? static_cast<double>(count.at(token)) : 0.0;
    sum += (seen - expected) * (seen - expected) / expected;
    all += p;
  }
  EXPECT_NEAR(all, 1.0, 1e-12);
  return sum;
}

// Probabilities 0.4, 0.05, 0.25, 0.2, 0.1 of tokens 0 to 4, but for a constant.
Tensor five_logits() {
  return at::tensor(std::vector<double>{std::log(0.4) + 3, std::log(0.05) + 3, std::log(0.25) + 3, std::log(0.2) + 3, std::log(0.1) + 3});
}

// Of 4 degrees of freedom: above 23.5 once in 10,000 seeds. This seed is one, and always the same.
TEST(ChooseToken, DrawsFollowTheProbabilities) {
  EXPECT_LT(chi_square(draw(five_logits(), {.temperature = 1.0}), {{0, 0.4}, {1, 0.05}, {2, 0.25}, {3, 0.2}, {4, 0.1}}), 23.5);
}

TEST(ChooseToken, TemperatureSharpens) {
  double sum = 0;
  const std::vector<double> p = {0.4, 0.05, 0.25, 0.2, 0.1};
  std::map<int64_t, double> expected;
  for (const double each : p) sum += each * each;   // temperature 0.5: squared
  for (size_t i = 0; i < p.size(); ++i) expected[static_cast<int64_t>(i)] = p[i] * p[i] / sum;
  const std::map<int64_t, int64_t> cold = draw(five_logits(), {.temperature = 0.5});
  EXPECT_LT(chi_square(cold, expected), 23.5);
  EXPECT_GT(chi_square(draw(five_logits(), {.temperature = 1.0}), expected), 1000) << "the test tells temperatures apart";
}

TEST(ChooseToken, TopPKeepsTheFewestThatReachIt) {
  const double kept = 0.4 + 0.25 + 0.2;
  const std::map<int64_t, double> three = {{0, 0.4 / kept}, {2, 0.25 / kept}, {3, 0.2 / kept}};
  EXPECT_LT(chi_square(draw(five_logits(), {.temperature = 1.0, .top_p = 0.8}), three), 20);   // 2 degrees of freedom
  EXPECT_LT(chi_square(draw(five_logits(), {.temperature = 1.0, .top_p = 0.66}), three), 20);
  EXPECT_EQ(draw(five_logits(), {.temperature = 1.0, .top_p = 0.3}), (std::map<int64_t, int64_t>{{0, kDraws}}));
  EXPECT_EQ(draw(five_logits(), {.temperature = 1.0, .top_p = 1e-9}), (std::map<int64_t, int64_t>{{0, kDraws}}));
}

TEST(ChooseToken, ASeedIsAText) {
  EXPECT_EQ(draw(five_logits(), {.temperature = 1.0}, 9), draw(five_logits(), {.temperature = 1.0}, 9));
  EXPECT_NE(draw(five_logits(), {.temperature = 1.0}, 9), draw(five_logits(), {.temperature = 1.0}, 10));
}

TEST(ChooseToken, GreedyTakesTheFirstOfEquals) {
  const Tensor logits = at::tensor(std::vector<float>{1, 4, -2, 4, 3});
  EXPECT_EQ(choose_token(logits, {}, 0.999), 1);
  EXPECT_EQ(choose_token(logits.to(at::kBFloat16), {}, 0.0), 1);
  EXPECT_EQ(choose_token(logits, {.temperature = 1e-3}, 0.999999), 3) << "equals share";
}

TEST(ChooseToken, TheBordersOfTheUniformNumber) {
  const TokenChoice choice{.temperature = 1.0};
  EXPECT_EQ(choose_token(five_logits(), choice, 0.0), 0);
  EXPECT_EQ(choose_token(five_logits(), choice, 0.39), 0);
  EXPECT_EQ(choose_token(five_logits(), choice, 0.41), 2);
  EXPECT_EQ(choose_token(five_logits(), choice, std::nextafter(1.0, 0.0)), 1) << "the least likely comes last";
}

TEST(ChooseToken, WhatIsNoNumberIsNoToken) {
  EXPECT_THROW(choose_token(at::tensor(std::vector<float>{1, std::numeric_limits<float>::quiet_NaN()}), {}, 0.5), std::runtime_error);
  const float minus = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(choose_token(at::tensor(std::vector<float>{minus, 0, minus}), {.temperature = 2.0}, 0.99), 1);
}

}  // namespace
}  // namespace upcycle
