#include "moe/capacity.hpp"

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "ops/permute.hpp"
#include "support/numbers.hpp"

// Shapes: T tokens, K choices of each, E experts.
namespace upcycle {
namespace {

Routing routing_of(const Tensor& expert_TK, const Tensor& weight_TK, int64_t experts) {
  return {expert_TK, weight_TK, count_choices(expert_TK, experts)};
}

/// Expert by expert: its choices, best first, the rest dropped.
Tensor written_out(const Routing& routing, const Tensor& token_T, int64_t capacity, DropPolicy policy, int64_t experts) {
  Tensor kept = routing.expert_TK.clone();
  for (int64_t e = 0; e < experts; ++e) {
    std::vector<std::tuple<float, int64_t, int64_t, int64_t>> found;   // less is better: -weight, number, row, choice
    for (int64_t t = 0; t < kept.size(0); ++t) {
      for (int64_t k = 0; k < kept.size(1); ++k) {
        if (routing.expert_TK[t][k].item<int64_t>() != e) continue;
        const float weight = policy == DropPolicy::weight ? routing.weight_TK[t][k].item<float>() : 0.0F;
        found.emplace_back(-weight, token_T[t].item<int64_t>(), t, k);
      }
    }
    std::sort(found.begin(), found.end());
    for (size_t i = static_cast<size_t>(capacity); i < found.size(); ++i) kept[std::get<2>(found[i])][std::get<3>(found[i])] = experts;
  }
  return kept;
}

TEST(Capacity, IsTheShareAtBalanceTimesTheFactor) {
  EXPECT_EQ(capacity_of(1.0, 64, 2, 8), 16);
  EXPECT_EQ(capacity_of(1.25, 64, 2, 8), 20);
  EXPECT_EQ(capacity_of(1.0, 63, 2, 8), 16);   // 15.75
  EXPECT_EQ(capacity_of(0.01, 64, 2, 8), 1);
  EXPECT_EQ(capacity_of(1.0, 0, 2, 8), 0);
}

TEST(Capacity, KeepsTheBestOfEachExpert) {
  const Communicator alone;
  for (const auto& [tokens, experts, top_k] : {std::tuple{40, 8, 2}, {33, 5, 3}, {7, 4, 4}, {0, 4, 2}}) {
    const Tensor expert_TK = choose_experts(normal({tokens, experts}, 1), top_k);
    const Tensor weight_TK = (normal({tokens, top_k}, 2).abs() * 4).round() / 4;   // many ties
    const Tensor token_T = normal({tokens}, 3).argsort(int64_t{-1}) * 10;
    for (const DropPolicy policy : {DropPolicy::weight, DropPolicy::position}) {
      for (const double factor : {0.3, 0.75, 1.0, 1.5, 100.0}) {
        const Routing routing = routing_of(expert_TK, weight_TK, experts);
        const Routing kept = limited(routing, token_T, alone, {factor, policy});
        EXPECT_EQ(kept.capacity, capacity_of(factor, tokens, top_k, experts));
        EXPECT_TRUE(kept.expert_TK.equal(written_out(routing, token_T, kept.capacity, policy, experts)));
        EXPECT_TRUE(kept.count_E.equal(count_choices(kept.expert_TK, experts)));
        EXPECT_TRUE(kept.weight_TK.is_same(routing.weight_TK));
      }
    }
  }
}

TEST(Capacity, OfEqualsTheFirstTokenStays) {
  const Communicator alone;
  const Routing all_to_one = routing_of(at::zeros({4, 1}, at::kLong), at::tensor({0.5F, 0.5F, 0.5F, 0.5F}).view({4, 1}), 2);
  const Tensor token_T = at::tensor({30, 10, 0, 20}, at::kLong);
  for (const DropPolicy policy : {DropPolicy::weight, DropPolicy::position}) {
    EXPECT_TRUE(limited(all_to_one, token_T, alone, {1.0, policy}).expert_TK.view({-1}).equal(at::tensor({2, 0, 0, 2}, at::kLong)));
  }
  const Routing none = limited(all_to_one, token_T, alone, {0.0});
  EXPECT_EQ(none.capacity, 0);
  EXPECT_TRUE(none.expert_TK.is_same(all_to_one.expert_TK));
}

}  // namespace
}  // namespace upcycle
