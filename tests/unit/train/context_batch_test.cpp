#include "train/context_batch.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

namespace upcycle {
namespace {

TEST(ContextBatch, EachRankGetsItsTwoChunksOfEverything) {
  const Tensor tokens = at::arange(2 * 16, at::kLong).view({2, 16});
  const Batch batch{tokens, tokens + 1, tokens.remainder(16).div(5, "floor") * 5, tokens.remainder(3).eq(0)};
  for (int rank = 0; rank < 4; ++rank) {
    const Batch mine = of_context_rank(batch, 4, rank);
    const auto chunks = [&](const Tensor& x) { return at::cat({x.narrow(1, 2 * rank, 2), x.narrow(1, 2 * (7 - rank), 2)}, 1); };
    EXPECT_TRUE(mine.tokens_BS.equal(chunks(batch.tokens_BS)));
    EXPECT_TRUE(mine.labels_BS.equal(chunks(batch.labels_BS)));
    EXPECT_TRUE(mine.starts_BS.equal(chunks(batch.starts_BS)));
    EXPECT_TRUE(mine.learn_BS.equal(chunks(batch.learn_BS)));
  }
  const Batch plain{tokens, tokens + 1, {}};
  EXPECT_FALSE(of_context_rank(plain, 4, 1).starts_BS.defined());
  EXPECT_FALSE(of_context_rank(plain, 4, 1).learn_BS.defined());
  EXPECT_TRUE(of_context_rank(batch, 1, 0).tokens_BS.is_same(batch.tokens_BS));
}

}  // namespace
}  // namespace upcycle
