#include "data/permutation.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <vector>

namespace upcycle {
namespace {

std::vector<int64_t> order(int64_t size, int64_t which, uint64_t seed = 1) {
  const Permutation permutation(size, Random(seed, "test"), which);
  std::vector<int64_t> out;
  for (int64_t i = 0; i < size; ++i) out.push_back(permutation(i));
  return out;
}

TEST(Permutation, HitsEveryIndexOnce) {
  for (int64_t size = 1; size <= 300; ++size) {
    for (int64_t which = 0; which < 3; ++which) {
      const std::vector<int64_t> out = order(size, which);
      const std::set<int64_t> seen(out.begin(), out.end());
      ASSERT_EQ(static_cast<int64_t>(seen.size()), size);
      ASSERT_EQ(*seen.begin(), 0);
      ASSERT_EQ(*seen.rbegin(), size - 1);
    }
  }
  const std::vector<int64_t> out = order(1'000'003, 5);
  std::vector<bool> seen(out.size());
  for (const int64_t value : out) {
    ASSERT_TRUE(value >= 0 && value < 1'000'003 && !seen[value]);
    seen[value] = true;
  }
}

TEST(Permutation, StaysInRangeForHugeSizes) {
  const int64_t size = int64_t{1} << 52;
  const Permutation permutation(size, Random(3, "test"), 0);
  std::set<int64_t> seen;
  for (int64_t i = 0; i < 10'000; ++i) {
    const int64_t value = permutation(size - 1 - i);
    ASSERT_TRUE(value >= 0 && value < size);
    ASSERT_TRUE(seen.insert(value).second);
  }
}

TEST(Permutation, DiffersBySeedAndWhich) {
  std::set<std::vector<int64_t>> seen;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    for (int64_t which = 0; which < 10; ++which) EXPECT_TRUE(seen.insert(order(50, which, seed)).second);
  }
  EXPECT_EQ(order(50, 3, 4), order(50, 3, 4));
}

// All 24 orders of 4 things, each about as often: chi-squared with 23 degrees of freedom.
TEST(Permutation, SmallOrdersAreEquallyLikely) {
  std::map<std::vector<int64_t>, int> count;
  constexpr int kDraws = 24'000;
  for (int which = 0; which < kDraws; ++which) ++count[order(4, which)];
  ASSERT_EQ(count.size(), 24u);
  double chi2 = 0;
  for (const auto& [unused, n] : count) chi2 += (n - 1000.0) * (n - 1000.0) / 1000.0;
  EXPECT_LT(chi2, 49.7) << "p = 0.001";
}

// Where index 0 lands, and how far neighbours land from each other, as in a uniformly random order.
TEST(Permutation, LooksRandom) {
  constexpr int64_t kSize = 1000, kDraws = 2000;
  std::vector<double> bins(20);
  double distance = 0;
  for (int64_t which = 0; which < kDraws; ++which) {
    const Permutation permutation(kSize, Random(9, "test"), which);
    const int64_t first = permutation(0), second = permutation(1);
    bins[first * 20 / kSize] += 1;
    distance += std::abs(static_cast<double>(first - second));
  }
  double chi2 = 0;
  for (const double n : bins) chi2 += (n - 100.0) * (n - 100.0) / 100.0;
  EXPECT_LT(chi2, 43.8) << "19 degrees of freedom, p = 0.001";
  // Mean (size + 1) / 3, variance size^2 / 18: within 3.3 standard errors.
  EXPECT_NEAR(distance / kDraws, (kSize + 1) / 3.0, 3.3 * kSize / std::sqrt(18.0 * kDraws));
}

TEST(Permutation, OfNothingIsAFault) { EXPECT_THROW(Permutation(0, Random(1, "test"), 0), std::invalid_argument); }

}  // namespace
}  // namespace upcycle
