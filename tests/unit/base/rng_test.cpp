#include "base/rng.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace upcycle {
namespace {

using Counter = std::array<uint32_t, 4>;
using Key = std::array<uint32_t, 2>;

// Known answers of Random123 (kat_vectors, "philox4x32 10").
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32_10(Counter{0, 0, 0, 0}, Key{0, 0}), (Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32_10(Counter{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, Key{0xffffffff, 0xffffffff}),
            (Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32_10(Counter{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, Key{0xa4093822, 0x299f31d0}),
            (Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, IsAFunctionOfSeedStreamAndIndex) {
  const Random a(7, "model.layers.1.mlp.gate.weight/router");
  const Random same(7, "model.layers.1.mlp.gate.weight/router");
  const Random other_stream(7, "model.layers.2.mlp.gate.weight/router");
  const Random other_seed(8, "model.layers.1.mlp.gate.weight/router");
  std::set<uint64_t> seen;
  for (uint64_t i = 0; i < 1000; ++i) {
    EXPECT_EQ(a.bits(i), same.bits(i));
    EXPECT_TRUE(seen.insert(a.bits(i)).second);
    EXPECT_TRUE(seen.insert(other_stream.bits(i)).second);
    EXPECT_TRUE(seen.insert(other_seed.bits(i)).second);
  }
  EXPECT_NE(a.bits(0), a.bits(uint64_t{1} << 32)) << "the upper half of the index counts";
}

TEST(Random, UniformFillsTheUnitIntervalEvenly) {
  const Random random(1, "uniform");
  constexpr int kDraws = 200000, kBins = 20;
  std::vector<int> bins(kBins);
  for (uint64_t i = 0; i < kDraws; ++i) {
    const double u = random.uniform(i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++bins[static_cast<size_t>(u * kBins)];
  }
  double chi2 = 0.0;
  const double expected = static_cast<double>(kDraws) / kBins;
  for (const int n : bins) chi2 += (n - expected) * (n - expected) / expected;
  EXPECT_LT(chi2, 43.8) << "19 degrees of freedom, p = 0.001";
}

TEST(Random, NormalHasTheMomentsOfANormal) {
  const Random random(2, "normal");
  constexpr int kDraws = 200000;
  double sum = 0, sum2 = 0, sum4 = 0;
  int beyond2 = 0;
  for (uint64_t i = 0; i < kDraws; ++i) {
    const double x = random.normal(i);
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    sum2 += x * x;
    sum4 += x * x * x * x;
    beyond2 += std::abs(x) > 2.0;
  }
  EXPECT_NEAR(sum / kDraws, 0.0, 0.01);
  EXPECT_NEAR(sum2 / kDraws, 1.0, 0.015);
  EXPECT_NEAR(sum4 / kDraws, 3.0, 0.1);
  EXPECT_NEAR(static_cast<double>(beyond2) / kDraws, 0.0455, 0.0025);
}

TEST(Random, BelowStaysBelowAndReachesEverything) {
  const Random random(3, "below");
  std::vector<int> counts(7);
  for (uint64_t i = 0; i < 70000; ++i) ++counts.at(random.below(7, i));
  for (const int n : counts) EXPECT_NEAR(n, 10000, 500);
  for (uint64_t i = 0; i < 100; ++i) EXPECT_EQ(random.below(1, i), 0u);
}

}  // namespace
}  // namespace upcycle
