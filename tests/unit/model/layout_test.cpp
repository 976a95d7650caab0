#include "model/layout.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"

namespace upcycle {
namespace {

Architecture layers(int64_t count) {
  Architecture a;
  a.layers = count;
  return a;
}

std::vector<int> chunks(int64_t count, const ParallelSection& parallel) {
  return make_layout(layers(count), Grid(parallel, static_cast<int>(parallel.pipeline)), parallel).chunk_of_layer;
}

std::string refusal(int64_t count, const ParallelSection& parallel) {
  try {
    chunks(count, parallel);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Layout, EarlierChunksTakeOneMoreWhereLayersDoNotDivide) {
  EXPECT_EQ(chunks(3, {}), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(chunks(4, {.pipeline = 2}), (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(chunks(7, {.pipeline = 3}), (std::vector<int>{0, 0, 0, 1, 1, 2, 2}));
  EXPECT_EQ(chunks(6, {.pipeline = 2, .virtual_stages = 2}), (std::vector<int>{0, 0, 1, 1, 2, 3}));
}

TEST(Layout, ChunksGoRoundTheStages) {
  const ParallelSection parallel{.pipeline = 2, .virtual_stages = 3};
  const Layout layout = make_layout(layers(6), Grid(parallel, 2), parallel);
  EXPECT_EQ(layout.chunks(), 6);
  for (int64_t layer = 0; layer < 6; ++layer) EXPECT_EQ(layout.stage_of(layer), layer % 2);
}

TEST(Layout, EmbeddingAndLossCountAsLayersOnRequest) {
  EXPECT_EQ(chunks(6, {.pipeline = 4, .count_embedding = true, .count_loss = true}), (std::vector<int>{0, 1, 1, 2, 2, 3}));
  EXPECT_EQ(chunks(5, {.pipeline = 3, .count_embedding = true}), (std::vector<int>{0, 1, 1, 2, 2}));
  EXPECT_EQ(chunks(5, {.pipeline = 3, .count_loss = true}), (std::vector<int>{0, 0, 1, 1, 2}));
}

TEST(Layout, TheRunsOwnNumbersWin) {
  EXPECT_EQ(chunks(5, {.pipeline = 2, .layout = {1, 4}}), (std::vector<int>{0, 1, 1, 1, 1}));
  EXPECT_EQ(chunks(5, {.pipeline = 2, .virtual_stages = 2, .layout = {1, 1, 2, 1}}), (std::vector<int>{0, 1, 2, 2, 3}));
}

TEST(Layout, RefusalsNameTheNumbers) {
  EXPECT_EQ(refusal(5, {.pipeline = 6}),
            "pipeline = 6 x virtual_stages = 1 makes 6 chunks for num_hidden_layers = 5: every chunk needs at least one layer, so 5 is the most");
  EXPECT_EQ(refusal(4, {.pipeline = 4, .count_loss = true}),
            "pipeline = 4 x virtual_stages = 1 makes 4 chunks for num_hidden_layers = 4, the loss: every chunk needs at least one layer");
  EXPECT_EQ(refusal(5, {.pipeline = 2, .layout = {2, 2}}),
            "parallel.layout has 4 layers in 2 chunks; the model has 5 in 2 (pipeline 2 x virtual_stages 1)");
  EXPECT_EQ(refusal(5, {.pipeline = 2, .virtual_stages = 2, .layout = {2, 3}}),
            "parallel.layout has 5 layers in 2 chunks; the model has 5 in 4 (pipeline 2 x virtual_stages 2)");
}

}  // namespace
}  // namespace upcycle
