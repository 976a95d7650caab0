#include "data/blend_schedule.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

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

/// The same for many data sets: a count strays furthest just before and just after its data set is drawn, so only these are looked
/// at, and all at the end. Weights are exact to 1e-16 of n: `slack` covers what this adds up to.
void holds_at_draws(const std::vector<double>& weights, int64_t samples, double slack) {
  const BlendSchedule schedule(blend(weights));
  long double sum = 0;
  for (const double weight : weights) sum += weight;
  std::vector<int64_t> count(weights.size());
  const auto quota = [&](size_t d, int64_t n) { return static_cast<double>(weights[d] / sum * n); };
  for (int64_t n = 0; n < samples; ++n) {
    const auto pick = schedule.at(n);
    const auto d = static_cast<size_t>(pick.dataset);
    ASSERT_EQ(pick.sample, count[d]) << "position " << n;
    ASSERT_LT(quota(d, n) - static_cast<double>(count[d]), 1 + slack) << "data set " << d << " came too late, at " << n;
    ++count[d];
    ASSERT_LT(static_cast<double>(count[d]) - quota(d, n + 1), 1 + slack) << "data set " << d << " came too early, at " << n;
  }
  for (size_t d = 0; d < weights.size(); ++d) ASSERT_LT(std::abs(count[d] - quota(d, samples)), 1 + slack) << d;
}

/// Weights as they come out of counting tokens: no short cycle has them.
std::vector<double> uneven(size_t datasets) {
  std::vector<double> weights;
  for (size_t d = 0; d < datasets; ++d) weights.push_back(1e9 / std::pow(1.0 + static_cast<double>(d), 1.3) + std::sqrt(d + 2.0));
  return weights;
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

TEST(BlendSchedule, WeightsThatNoShortCycleHas) {
  const std::vector<double> weights = {std::sqrt(2.0), std::acos(-1.0), std::exp(1.0), 0.1};
  EXPECT_GT(BlendSchedule(blend(weights)).period(), int64_t{1} << 60);
  holds(weights, 1'500'000, 1 + 1e-9);
  holds_at_draws({123456789, 98765, 4321, 7}, 4'000'000, 1e-9);
}

TEST(BlendSchedule, ManyDataSetsAndTinyWeights) {
  holds_at_draws(uneven(50), 2'000'000, 1e-9);
  holds_at_draws(uneven(1000), 1'500'000, 1e-9);
  std::vector<double> weights = uneven(20);
  for (const double tiny : {3e-7, 1e-8, 1e-12}) weights.push_back(1e9 * tiny);   // expected 0.2 times in a million, and less
  holds_at_draws(weights, 3'000'000, 1e-9);
  holds_at_draws({1.0, 1e-6, 3e-6}, 3'000'000, 1e-9);
}

// A run that goes on asks for positions that it never saw the way to.
TEST(BlendSchedule, AnyPositionIsTheSameWithoutItsHistory) {
  for (const std::vector<double>& weights : {std::vector<double>{0.7, 0.2, 0.1}, {123456, 7890, 45678, 901}, uneven(12)}) {
    const BlendSchedule all(blend(weights));
    std::vector<BlendSchedule::Pick> picks;
    for (int64_t n = 0; n < 400'000; ++n) picks.push_back(all.at(n));
    for (const int64_t n : {399'999, 65'536, 65'535, 0, 131'072, 250'001, 1}) {
      const BlendSchedule fresh(blend(weights));
      EXPECT_EQ(fresh.at(n), picks[n]) << n;
      EXPECT_EQ(fresh.at(n / 2), picks[n / 2]) << "backwards, from " << n;
    }
    uint64_t state = 1;
    for (int i = 0; i < 100; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const auto n = static_cast<int64_t>((state >> 33) % picks.size());
      ASSERT_EQ(all.at(n), picks[n]) << n;
      ASSERT_EQ(all.position_of(picks[n].dataset, picks[n].sample), n);
      ASSERT_EQ(all.drawn(picks[n].dataset, n), picks[n].sample);
      ASSERT_EQ(all.drawn(picks[n].dataset, n + 1), picks[n].sample + 1);
      ASSERT_GE(all.most(picks[n].dataset, n + 1), picks[n].sample + 1);
      ASSERT_LE(all.most(picks[n].dataset, n), picks[n].sample + 1);
    }
  }
}

TEST(BlendSchedule, SeveralThreadsMayAsk) {
  const std::vector<double> weights = uneven(7);
  const BlendSchedule alone(blend(weights)), shared(blend(weights));
  std::vector<std::thread> threads;
  std::vector<std::vector<BlendSchedule::Pick>> got(4);
  for (int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int64_t n = t; n < 200'000; n += 4) got[t].push_back(shared.at(n));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int64_t n = 0; n < 200'000; ++n) ASSERT_EQ(got[n % 4][n / 4], alone.at(n)) << n;
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
  EXPECT_NE(said({1, 1e-20}).find("set1: weight 1e-20 is nothing beside the others; leave it out"), std::string::npos);
}

}  // namespace
}  // namespace upcycle
