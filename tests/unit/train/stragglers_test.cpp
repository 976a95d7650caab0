#include "train/stragglers.hpp"

#include <gtest/gtest.h>

namespace upcycle {
namespace {

TEST(Stragglers, TheSlowestOfTheMeansOverTheMedian) {
  Stragglers stragglers({"a", "a", "b", "b"});
  EXPECT_FALSE(stragglers.take());
  stragglers.add({0, 0, 0, 0});   // the first step knows of none
  EXPECT_FALSE(stragglers.take());
  stragglers.add({1, 5, 3, 1});   // a step in which another one was slow
  stragglers.add({1, 1, 5, 3});
  const auto slowest = stragglers.take();
  ASSERT_TRUE(slowest);
  EXPECT_EQ(slowest->rank, 2);
  EXPECT_EQ(slowest->host, "b");
  EXPECT_EQ(slowest->seconds, 4);
  EXPECT_EQ(slowest->seconds_of_rank, (std::vector<double>{1, 3, 4, 2}));
  EXPECT_EQ(slowest->over_median, 4 / 2.5);
  EXPECT_FALSE(stragglers.take()) << "of the steps since the last call";
  stragglers.add({1, 1, 1, 0});
  EXPECT_FALSE(stragglers.take()) << "rank 3 has told of no step";
}

TEST(Stragglers, OneRankHasNobodyToWaitFor) {
  Stragglers alone({"a"});
  alone.add({});
  alone.add({1});
  EXPECT_FALSE(alone.take());
  Stragglers three({"a", "b", "c"});
  three.add({1, 2, 3});
  EXPECT_EQ(three.take()->over_median, 1.5);
  EXPECT_THROW(three.add({1}), std::logic_error);
}

}  // namespace
}  // namespace upcycle
