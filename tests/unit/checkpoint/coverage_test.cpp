#include "checkpoint/coverage.hpp"

#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace upcycle {
namespace {

using testing::HasSubstr;

Piece piece(const std::string& name, const Shape& shape, const Box& box, at::ScalarType dtype = at::kFloat) {
  return {name, shape, box, at::zeros(box.size, dtype)};
}

/// What is wrong with these pieces, one list a rank; "" for nothing.
std::string verdict(const std::vector<std::vector<Piece>>& ranks) {
  std::vector<std::string> declarations;
  for (const auto& pieces : ranks) declarations.push_back(declare(pieces));
  try {
    check_coverage(declarations);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

TEST(Coverage, AcceptsBoxesThatTile) {
  EXPECT_EQ(verdict({}), "");
  EXPECT_EQ(verdict({{piece("a", {4, 6}, whole({4, 6}))}, {}}), "");
  EXPECT_EQ(
      verdict({{piece("a", {4, 6}, {{0, 0}, {2, 3}}), piece("a", {4, 6}, {{2, 3}, {2, 3}}), piece("s", {}, {{}, {}})},
               {piece("a", {4, 6}, {{0, 3}, {2, 3}})},
               {piece("a", {4, 6}, {{2, 0}, {2, 3}}), piece("a", {4, 6}, {{1, 1}, {0, 3}}),
                piece("none", {0, 2}, whole({0, 2}))}}),
      "");
}

TEST(Coverage, NamesTheTensorThatIsWrong) {
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {}}), HasSubstr("tensor 'a' [4]: all ranks' boxes cover 2 of 4"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {3}})}, {piece("a", {4}, {{2}, {2}})}}),
              HasSubstr("the boxes [0:3] of rank 0 and [2:4] of rank 1 overlap"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {piece("a", {4}, {{0}, {2}})}}), HasSubstr("overlap"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{1}, {4}})}}), HasSubstr("the box [1:5] of rank 0 is not inside"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {piece("a", {5}, {{2}, {2}})}}),
              HasSubstr("rank 1 says Float[5], rank 0 says Float[4]"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {piece("a", {4}, {{2}, {2}}, at::kBFloat16)}}),
              HasSubstr("BFloat16"));
  for (const char* name : {"", ".", "a..b", ".a", "a.", "a/b"}) {
    EXPECT_THAT(verdict({{piece(name, {1}, whole({1}))}}), HasSubstr("can't name a tensor")) << name;
  }
  const Piece wrong{"a", {4}, {{0}, {4}}, at::zeros({3})};
  EXPECT_THROW(declare(std::span(&wrong, 1)), std::logic_error);
}

TEST(Names, PathsAndBack) {
  for (const char* name : {"a", "lm_head.weight", "model.layers.0.mlp.experts.up_proj.weight"}) {
    EXPECT_EQ(name_of_path(hdf5_path(name)), name);
  }
  EXPECT_EQ(hdf5_path("model.norm.weight"), "/model/norm/weight");
  EXPECT_THROW(hdf5_path(std::string("a\0b", 3)), std::logic_error);
}

}  // namespace
}  // namespace upcycle
