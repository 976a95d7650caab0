#include "model/buckets.hpp"

#include <gtest/gtest.h>

namespace upcycle {
namespace {

constexpr auto kHalf = at::kBFloat16, kFull = at::kFloat;

/// While one lives, buckets have another size.
struct BucketsOf {
  explicit BucketsOf(int64_t size) { bucket_elements = size; }
  ~BucketsOf() { bucket_elements = before; }
  const int64_t before = bucket_elements;
};

std::vector<size_t> first_weights(const std::vector<Bucket>& buckets) {
  std::vector<size_t> out;
  for (const Bucket& bucket : buckets) out.push_back(bucket.weights.front());
  return out;
}

TEST(Buckets, GoFromTheLastWeightToTheFirstByHoldersAndDtype) {
  const std::vector<Stored> weights = {{0, kHalf, 100, 100}, {1, kHalf, 7, 7}, {0, kFull, 8, 8}, {0, kHalf, 64, 64}, {1, kHalf, 9, 9}};
  const std::vector<Bucket> buckets = plan_buckets(weights, {{2, 1}, {4, 3}}, 0);
  ASSERT_EQ(buckets.size(), 3U);
  EXPECT_EQ(buckets[0].weights, std::vector<size_t>{2});   // complete first: the others wait for weights 1 and 0
  EXPECT_EQ(buckets[0].dtype, kFull);
  EXPECT_EQ(buckets[1].weights, (std::vector<size_t>{4, 1}));
  EXPECT_EQ(buckets[1].group, 1U);
  EXPECT_EQ(buckets[1].place.index, 3);
  EXPECT_EQ(buckets[2].weights, (std::vector<size_t>{3, 0}));
  EXPECT_EQ(buckets[2].runs, (std::vector<Range>{{0, 64}, {64, 164}}));
  EXPECT_EQ(buckets[2].size, 192) << "whole lines of 64";
  EXPECT_EQ(buckets[2].own, (Range{0, 192}));
  EXPECT_FALSE(buckets[2].divided());
}

TEST(Buckets, ZeroDividesEachEvenlyAmongItsHolders) {
  const std::vector<Stored> weights = {{0, kHalf, 100, 100}, {0, kHalf, 500, 500}, {1, kHalf, 10, 10}};
  std::vector<Range> parts;
  for (int64_t index = 0; index < 3; ++index) {
    const std::vector<Bucket> buckets = plan_buckets(weights, {{3, index}, {1, 0}}, 1);
    ASSERT_EQ(buckets.size(), 2U);
    EXPECT_FALSE(buckets[0].divided()) << "one holder owns all";
    EXPECT_EQ(buckets[1].size, 768);   // 512 + 128, up to a multiple of 3 * 64
    EXPECT_TRUE(buckets[1].divided());
    parts.push_back(buckets[1].own);
    EXPECT_EQ(buckets[1].owned(0), (std::vector<Range>{{0, 256}, {256, 500}, {512, 512}})[static_cast<size_t>(index)]);
    EXPECT_EQ(buckets[1].owned(1).size(), (std::vector<int64_t>{0, 0, 100})[static_cast<size_t>(index)]);
  }
  EXPECT_EQ(parts, (std::vector<Range>{{0, 256}, {256, 512}, {512, 768}}));
}

TEST(Buckets, CloseWhenFullAndLargeWeightsHaveTheirOwn) {
  const BucketsOf small(100);
  const std::vector<Stored> weights = {{0, kHalf, 60, 60}, {0, kHalf, 41, 41}, {0, kHalf, 1000, 1000}, {0, kHalf, 50, 50}, {0, kHalf, 50, 50}};
  const std::vector<Bucket> buckets = plan_buckets(weights, {{2, 0}}, 1);
  EXPECT_EQ(first_weights(buckets), (std::vector<size_t>{4, 2, 1, 0}));
  EXPECT_EQ(buckets[0].weights, (std::vector<size_t>{4, 3}));
}

// Ranks whose boxes differ by a row must still cut alike, or they would wait for each other's next bucket.
TEST(Buckets, TheirLimitsDoNotDependOnTheRanksOwnSizes) {
  const BucketsOf small(100);
  const auto plan = [](int64_t elements) { return first_weights(plan_buckets({{0, kHalf, 40, 40}, {0, kHalf, elements, 60}}, {{2, 0}}, 1)); };
  EXPECT_EQ(plan(60), plan(61));
  EXPECT_EQ(plan(60), plan(59));
}

TEST(Buckets, GroupsThatSpanStagesComeLast) {
  const std::vector<Stored> weights = {{1, kHalf, 10, 10}, {0, kHalf, 10, 10}, {2, kHalf, 10, 10}};
  EXPECT_EQ(first_weights(plan_buckets(weights, {{2, 0}, {2, 0}, {4, 0, true}}, 1)), (std::vector<size_t>{1, 0, 2}));
}

}  // namespace
}  // namespace upcycle
