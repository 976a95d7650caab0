#include "ops/permute.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include "unit/ops/reference.hpp"

// Shapes: T tokens, K choices of each, R = T*K rows, D width.
namespace upcycle {
namespace {

const Tensor kExpert_TK = at::tensor({2, 0, 1, 2, 2, 1, 0, 2}, at::kLong).view({4, 2});

TEST(RowOrder, SortsByExpertAndKeepsTheOrderOfChoices) {
  const RowOrder order = sort_by_expert(kExpert_TK, 4);
  EXPECT_TRUE(order.choice_R.equal(at::tensor({1, 6, 2, 5, 0, 3, 4, 7}, at::kLong)));
  EXPECT_TRUE(order.end_E.equal(at::tensor({2, 4, 8, 8}, at::kInt)));
  EXPECT_TRUE(order.row_TK.view({-1}).index_select(0, order.choice_R).equal(at::arange(8)));
  const RowOrder nobody = sort_by_expert(at::zeros({0, 2}, at::kLong), 3);
  EXPECT_TRUE(nobody.end_E.equal(at::zeros({3}, at::kInt)));
  EXPECT_EQ(nobody.choice_R.sizes(), (Shape{0}));
  EXPECT_EQ(nobody.row_TK.sizes(), (Shape{0, 2}));
}

// Experts 1 and 2 alone: choices 2, 5 and 0, 3, 4, 7.
TEST(RowOrder, OfSomeExpertsLeavesTheOthersChoicesWithoutARow) {
  EXPECT_TRUE(count_choices(kExpert_TK, 2, 1).equal(at::tensor({2, 4}, at::kLong)));
  const RowOrder order = sort_by_expert(kExpert_TK, 1, 2, 6);
  EXPECT_TRUE(order.choice_R.equal(at::tensor({2, 5, 0, 3, 4, 7}, at::kLong)));
  EXPECT_TRUE(order.row_TK.equal(at::tensor({2, 6, 0, 3, 4, 1, 6, 5}, at::kLong).view({4, 2})));
  EXPECT_TRUE(order.end_E.equal(at::tensor({2, 6}, at::kInt)));
  const RowOrder padded = slots_by_expert(kExpert_TK, 1, 2, 5);
  EXPECT_TRUE(padded.choice_R.equal(at::tensor({2, 5, 8, 8, 8, 0, 3, 4, 7, 8}, at::kLong)));
  EXPECT_TRUE(padded.row_TK.equal(at::tensor({5, 10, 0, 6, 7, 1, 10, 8}, at::kLong).view({4, 2})));
  EXPECT_TRUE(padded.end_E.equal(at::tensor({5, 10}, at::kInt)));
}

Tensor random_choice(int64_t tokens, int64_t experts, int64_t choices, uint64_t seed) {
  return normal({tokens, experts}, seed).argsort(int64_t{-1}).narrow(1, 0, choices).contiguous();
}

struct Form {
  int64_t tokens, choices, width;
};
const std::vector<Form> kForms = {{4, 2, 5}, {1, 1, 1}, {17, 8, 3}, {0, 2, 5}};

TEST(SpreadRows, GivesEachRowItsTokenAndSumsBack) {
  for (const auto& [tokens, choices, width] : kForms) {
    const RowOrder order = sort_by_expert(random_choice(tokens, 9, choices, 1), 9);
    expect_matches({{{tokens, width}}, {}, 1}, [&](const auto& x, auto&) { return spread_rows(x[0], order); },
                   [&](const auto& x, const auto&) { return x[0].repeat_interleave(choices, 0).index_select(0, order.choice_R); });
  }
}

TEST(AddRows, AddsTheSumsOntoWhatIsThere) {
  for (const auto& [tokens, choices, width] : kForms) {
    const RowOrder order = sort_by_expert(random_choice(tokens, 9, choices, 2), 9);
    expect_matches({{{tokens, width}, {tokens * choices, width}}, {}, 1}, [&](const auto& x, auto&) { return add_rows(x[0], x[1], order); },
                   [&](const auto& x, const auto&) {
                     return x[0] + x[1].index_select(0, order.row_TK.reshape({-1})).view({tokens, choices, width}).sum(1);
                   });
  }
  // Rounded once: 2^-8 + 2^-17, were it rounded to bf16 on its way, would be 2^-8, and 1 + 2^-8 is 1.
  const Tensor one = at::full({1, 1}, 1.0, at::kBFloat16), parts = at::tensor({0x1p-8F, 0x1p-17F}).to(at::kBFloat16).view({2, 1});
  const RowOrder order = sort_by_expert(at::tensor({0, 1}, at::kLong).view({1, 2}), 2);
  EXPECT_EQ(one.add(sum_rows(parts, order)).item<float>(), 1.0F);
  EXPECT_EQ(add_rows(one, parts, order).item<float>(), 1.0F + 0x1p-7F);
}

TEST(SumRows, BringsRowsHome) {
  for (const auto& [tokens, choices, width] : kForms) {
    const RowOrder order = sort_by_expert(random_choice(tokens, 9, choices, 2), 9);
    expect_matches({{{tokens * choices, width}}, {}, 1}, [&](const auto& x, auto&) { return sum_rows(x[0], order); },
                   [&](const auto& x, const auto&) {
                     return x[0].index_select(0, order.row_TK.view({-1})).view({tokens, choices, width}).sum(1);
                   });
  }
}

TEST(SpreadRows, TakesARowOfEachChoiceToo) {
  for (const auto& [tokens, choices, width] : kForms) {
    const RowOrder order = by_choice(sort_by_expert(random_choice(tokens, 9, choices, 2), 9));
    expect_matches({{{tokens * choices, 1}}, {}, 1}, [&](const auto& x, auto&) { return spread_rows(x[0], order); },
                   [&](const auto& x, const auto&) { return x[0].index_select(0, order.choice_R); });
  }
}

// Rows without a choice, choices without a row: zeros there, and no gradient.
TEST(SpreadAndSum, LeaveOutWhatHasNoCounterpart) {
  for (const auto& [tokens, choices, width] : kForms) {
    const Tensor expert_TK = random_choice(tokens, 9, choices, 2);
    const int64_t rows = expert_TK.ge(3).logical_and(expert_TK.lt(7)).sum().item<int64_t>();
    for (const RowOrder& order : {sort_by_expert(expert_TK, 3, 4, rows), slots_by_expert(expert_TK, 3, 4, tokens)}) {
      const auto whole = [](const Tensor& x) { return at::cat({x, at::zeros({1, x.size(1)}, x.options())}, 0); };
      expect_matches({{{tokens, width}}, {}, 1}, [&](const auto& x, auto&) { return spread_rows(x[0], order); },
                     [&](const auto& x, const auto&) {
                       return whole(x[0].repeat_interleave(choices, 0)).index_select(0, order.choice_R);
                     });
      expect_matches({{{tokens * choices, 1}}, {}, 1}, [&](const auto& x, auto&) { return spread_rows(x[0], by_choice(order)); },
                     [&](const auto& x, const auto&) { return whole(x[0]).index_select(0, order.choice_R); });
      expect_matches({{{order.choice_R.size(0), width}}, {}, 1}, [&](const auto& x, auto&) { return sum_rows(x[0], order); },
                     [&](const auto& x, const auto&) {
                       return whole(x[0]).index_select(0, order.row_TK.view({-1})).view({tokens, choices, width}).sum(1);
                     });
    }
  }
}

TEST(PermuteRows, GoesThereAndBack) {
  for (const int64_t rows : {0, 1, 13}) {
    const Tensor permutation = normal({rows}, 3).argsort(int64_t{-1});
    expect_matches({{{rows, 3}}, {}, 1}, [&](const auto& x, auto&) { return permute_rows(x[0], permutation); },
                   [&](const auto& x, const auto&) { return x[0].index_select(0, permutation); });
  }
}

// 1 + 8 * 2^-9: rounded to bf16 after each addition, the small ones would vanish.
TEST(SpreadRows, SumsGradientsInFp32) {
  const int64_t choices = 9;
  const RowOrder order = sort_by_expert(at::arange(choices).view({1, choices}), choices);
  const Tensor x = at::zeros({1, 1}, at::kBFloat16).requires_grad_();
  Tensor dy = at::zeros({choices, 1}, at::kBFloat16).add_(0x1p-9);
  dy[0].fill_(1.0);
  run_backward(spread_rows(x, order), dy);
  EXPECT_EQ(x.grad().item<float>(), 1.0F + 0x1p-6F);
  EXPECT_EQ(sum_rows(dy, order).item<float>(), 1.0F + 0x1p-6F);
  dy.mul_(0x1p-2)[0].fill_(1.0);
  EXPECT_EQ(sum_rows(dy, order).item<float>(), 1.0F);
  EXPECT_EQ(sum_rows(dy, order, at::kFloat).item<float>(), 1.0F + 0x1p-8F);
}

}  // namespace
}  // namespace upcycle
