#include "checkpoint/boxes.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

namespace upcycle {
namespace {

TEST(Boxes, MoveIntoAnothersCoordinatesAndBack) {
  EXPECT_EQ(shifted({{1, 2}, {3, 4}}, {10, 20}), (Box{{11, 22}, {3, 4}}));
  EXPECT_EQ(relative_to({{11, 22}, {3, 4}}, {{10, 20}, {9, 9}}), (Box{{1, 2}, {3, 4}}));
}

TEST(Boxes, HaveInCommonWhatBothHold) {
  EXPECT_EQ(intersection({{0, 2}, {4, 4}}, {{1, 0}, {9, 3}}), (Box{{1, 2}, {3, 1}}));
  EXPECT_EQ(intersection({{0, 2}, {4, 4}}, {{4, 2}, {1, 1}}), std::nullopt);
  EXPECT_EQ(intersection({{}, {}}, {{}, {}}), (Box{{}, {}}));
}

TEST(Boxes, SpanFromTheirFirstToTheirLastElement) {
  const ElementRange run = span_of({{1, 1, 2}, {2, 1, 3}}, {4, 3, 5});
  EXPECT_EQ(run.begin, 15 + 5 + 2);
  EXPECT_EQ(run.end, 30 + 5 + 4 + 1);
  EXPECT_EQ(span_of({{}, {}}, {}).size(), 1);
}

TEST(BoxesOfRun, LaidEndToEndAreTheRun) {
  for (const Shape& size : {Shape{}, Shape{7}, Shape{3, 4}, Shape{2, 3, 5}, Shape{4, 1, 3, 2}, Shape{1, 1, 6}}) {
    const Tensor x = at::arange(elements(size), at::kLong).reshape(size);
    for (int64_t begin = 0; begin <= elements(size); ++begin) {
      for (int64_t end = begin; end <= elements(size); ++end) {
        std::vector<Tensor> parts = {x.new_empty({0})};
        const std::vector<Box> boxes = boxes_of_run(size, begin, end);
        ASSERT_LE(boxes.size(), std::max<size_t>(1, 2 * size.size() - 1));
        for (const Box& box : boxes) {
          ASSERT_TRUE(inside(box, size)) << describe(box);
          ASSERT_GT(elements(box), 0);
          parts.push_back(view_of(x, box).reshape({-1}));
        }
        ASSERT_TRUE(at::equal(at::cat(parts), x.reshape({-1}).narrow(0, begin, end - begin))) << describe(size) << " " << begin << ":" << end;
      }
    }
  }
}

TEST(BoxesOfRun, OfWholeRowsIsOneBox) {
  EXPECT_EQ(boxes_of_run({4, 3, 5}, 15, 45), (std::vector<Box>{{{1, 0, 0}, {2, 3, 5}}}));
  EXPECT_EQ(boxes_of_run({4, 3, 5}, 16, 59).size(), 5u);
}

}  // namespace
}  // namespace upcycle
