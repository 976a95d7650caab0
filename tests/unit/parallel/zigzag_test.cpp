#include "parallel/zigzag.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace upcycle {
namespace {

TEST(Zigzag, EveryPositionOnOneRankAndTheSameWorkForAll) {
  for (const int ranks : {1, 2, 3, 4, 8}) {
    const int64_t length = 48;
    std::vector<int> holders(length);
    for (int rank = 0; rank < ranks; ++rank) {
      int64_t positions = 0, scores = 0;
      for (const Stretch& held : zigzag(length, ranks, rank)) {
        positions += held.size();
        for (int64_t p = held.begin; p < held.end; ++p) ++holders[p], scores += p + 1;
      }
      EXPECT_EQ(positions, length / ranks);
      EXPECT_EQ(scores, length * (length + 1) / 2 / ranks);
    }
    EXPECT_EQ(std::count(holders.begin(), holders.end(), 1), length);
  }
}

TEST(Zigzag, ChunksOfFourRanks) {
  EXPECT_EQ(zigzag(16, 1, 0), (std::vector<Stretch>{{0, 16}}));
  EXPECT_EQ(zigzag(16, 4, 0), (std::vector<Stretch>{{0, 2}, {14, 16}}));
  EXPECT_EQ(zigzag(16, 4, 3), (std::vector<Stretch>{{6, 8}, {8, 10}}));
  EXPECT_EQ(zigzag(15, 1, 0), (std::vector<Stretch>{{0, 15}}));
  EXPECT_THROW(zigzag(20, 4, 0), std::logic_error);
}

TEST(Zigzag, OrdersThereAndBack) {
  for (const int ranks : {1, 2, 4}) {
    const Tensor x_BS = at::arange(3 * 16 * 5, at::kLong).view({3, 16, 5});
    std::vector<Tensor> parts;
    for (int rank = 0; rank < ranks; ++rank) parts.push_back(take_zigzag(x_BS, ranks, rank));
    const Tensor x_RBC = at::stack(parts);
    EXPECT_TRUE(in_sequence_order(x_RBC).equal(x_BS));
    EXPECT_TRUE(in_rank_order(x_BS, ranks).equal(x_RBC));
  }
}

}  // namespace
}  // namespace upcycle
