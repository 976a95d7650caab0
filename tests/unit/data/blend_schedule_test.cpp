#include "data/blend_schedule.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

std::vector<Blend> blend(const std::vector<double>& weights) {
  std::vector<Blend> out;
  for (size_t d = 0; d < weights.size(); ++d) out.push_back({weights[d], "set" + std::to_string(d)});
  return out;
}

/// After every prefix of n samples each count is less than `bound` away from w * n, and each data set's samples are 0,
/// 1, 2, ...
void holds(const std::vector<double>& weights, int64_t samples, double bound) {
  const BlendSchedule schedule(blend(weights));
  double sum = 0;
  for (const double weight : weights) sum += weight;
  std::vector<int64_t> count(weights.size());
  for (int64_t n = 0; n < samples; ++n) {
    const auto pick = schedule.at(n);
    ASSERT_EQ(pick.sample, count[pick.dataset]) << "position " << n;
    ++count[pick.dataset];
    for (size_t d = 0; d < weights.size(); ++d) {
      ASSERT_LT(std::abs(count[d] - weights[d] / sum * static_cast<double>(n + 1)), bound)
          << "data set " << d << " after " << n + 1;
    }
  }
}

TEST(BlendSchedule, EveryPrefixIsWithinOneOfTheWeights) {
  holds({1.0}, 100, 1e-12);
  holds({0.7, 0.2, 0.1}, 10'000, 1);
  holds({0.5, 0.5}, 10'000, 1);
  holds({0.333, 0.333, 0.334}, 10'000, 1);
  holds({3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 10'000, 1);
  holds({0.9, 0.0101, 0.0202, 0.0003, 0.0694}, 50'000, 1);
  holds({123456, 7890, 45678, 901}, 600'000, 1);
  holds(std::vector<double>(100, 0.01), 1'000, 1);
}

TEST(BlendSchedule, ManyRandomBlends) {
  uint64_t state = 12345;
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<double> weights(2 + trial % 20);
    for (double& weight : weights) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      weight = 1.0 + static_cast<double>((state >> 33) % 50);
    }
    holds(weights, 3'000, 1);
  }
}

// Irrational weights: the cycle has 2^20 places, so the distance may grow by n / 2^20.
TEST(BlendSchedule, WeightsThatNoShortCycleHas) {
  const std::vector<double> weights = {std::sqrt(2.0), std::acos(-1.0), std::exp(1.0), 0.1};
  EXPECT_EQ(BlendSchedule(blend(weights)).period(), 1 << 20);
  holds(weights, 1'000'000, 2);
}

TEST(BlendSchedule, TheCycleIsTheShortest) {
  EXPECT_EQ(BlendSchedule(blend({5})).period(), 1);
  EXPECT_EQ(BlendSchedule(blend({0.7, 0.2, 0.1})).period(), 10);
  EXPECT_EQ(BlendSchedule(blend({2, 4})).period(), 3);
  EXPECT_EQ(BlendSchedule(blend({0.125, 0.875})).period(), 8);
  EXPECT_EQ(BlendSchedule(blend({0.7, 0.2, 0.1})).places(1), 2);
}

TEST(BlendSchedule, FarPositionsNeedNoHistory) {
  const BlendSchedule schedule(blend({0.7, 0.2, 0.1}));
  const auto near = schedule.at(3), far = schedule.at(1'000'000'000'003);
  EXPECT_EQ(near.dataset, far.dataset);
  EXPECT_EQ(far.sample, near.sample + 100'000'000'000 * schedule.places(near.dataset));
}

TEST(BlendSchedule, RefusesWeightsThatMakeNoSense) {
  const auto said = [](const std::vector<double>& weights) {
    return user_error([&] { BlendSchedule{blend(weights)}; });
  };
  EXPECT_EQ(said({1, 0}), "data set set1 has weight 0; weights are positive numbers, leave the data set out instead");
  EXPECT_NE(said({-1, 2}).find("set0 has weight -1"), std::string::npos);
  EXPECT_NE(said({1, std::nan("")}).find("set1 has weight nan"), std::string::npos);
  EXPECT_NE(said({1, INFINITY}).find("set1 has weight inf"), std::string::npos);
  EXPECT_NE(said({}).find("a blend of no data sets"), std::string::npos);
  EXPECT_NE(said({1, 1e-9}).find("set1: weight 1e-09 is less than one sample in 1048576"), std::string::npos);
}

}  // namespace
}  // namespace upcycle
