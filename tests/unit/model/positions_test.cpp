#include "model/positions.hpp"

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

namespace upcycle {
namespace {

using List = std::vector<Segment>;

TEST(Positions, SegmentsOfTheWholeSequence) {
  EXPECT_EQ(segments_of({{0, 6}}, nullptr), (List{{0, 6, 0, 6}}));
  const std::vector<int64_t> starts = {0, 1, 1, 1, 4, 4};
  EXPECT_EQ(segments_of({{0, 6}}, starts.data()), (List{{0, 1, 0, 1}, {1, 4, 1, 4}, {4, 6, 4, 6}}));
}

TEST(Positions, SegmentsOfAContextRankCrossTheBorders) {
  const std::vector<Stretch> held = {{2, 4}, {12, 14}};   // rank 1 of 4, 16 positions
  EXPECT_EQ(segments_of(held, nullptr), (List{{0, 2, 0, 4}, {2, 4, 0, 14}}));
}

TEST(Positions, SegmentsOfAContextRankMeetDocuments) {
  const std::vector<Stretch> held = {{2, 4}, {12, 14}};
  // One document from 1 to 2, one of position 3 alone, one from 5 on that reaches the end.
  EXPECT_EQ(segments_of(held, std::vector<int64_t>{1, 3, 5, 5}.data()), (List{{0, 1, 1, 3}, {1, 2, 3, 4}, {2, 4, 5, 14}}));
  // One document from 3 on: the two stretches stay two segments, for keys lie between them.
  EXPECT_EQ(segments_of(held, std::vector<int64_t>{0, 3, 3, 3}.data()), (List{{0, 1, 0, 3}, {1, 2, 3, 4}, {2, 4, 3, 14}}));
  // Stretches that touch: the mask is the same in two parts.
  EXPECT_EQ(segments_of({{6, 8}, {8, 10}}, nullptr), (List{{0, 2, 0, 8}, {2, 4, 0, 10}}));
}

TEST(Positions, OfABatch) {
  EXPECT_TRUE(segments_of(3, 8, {{0, 8}}, {}, at::kCPU).plain());
  EXPECT_TRUE(segments_of(2, 4, {{0, 4}}, at::tensor({0, 0, 0, 0, 0, 0, 0, 0}, at::kLong).view({2, 4}), at::kCPU).plain());
  const Segments packed = segments_of(2, 4, {{0, 4}}, at::tensor({0, 0, 0, 0, 0, 0, 2, 2}, at::kLong).view({2, 4}), at::kCPU);
  EXPECT_FALSE(packed.plain());
  EXPECT_TRUE(packed.rows().q_ends.equal(at::tensor({0, 4, 6, 8}, at::kInt)));
  const Segments context = segments_of(2, 8, {{0, 2}, {6, 8}}, {}, at::kCPU);
  EXPECT_TRUE(context.rows().k_ends.equal(at::tensor({0, 2, 10, 12, 20}, at::kInt)));
}

}  // namespace
}  // namespace upcycle
