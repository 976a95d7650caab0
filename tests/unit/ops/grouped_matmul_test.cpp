#include "ops/grouped_matmul.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>

#include <stdexcept>

#include "unit/ops/reference.hpp"

// Shapes: R rows sorted by expert, E experts, I inputs, O outputs.
namespace upcycle {
namespace {

void expect_grouped(const std::vector<int64_t>& count_E, int64_t in, int64_t out) {
  std::vector<int32_t> end_E;
  int64_t rows = 0;
  for (const int64_t count : count_E) end_E.push_back(static_cast<int32_t>(rows += count));
  const Tensor end = at::tensor(end_E, at::kInt);
  const Formula expert_by_expert = [&](const auto& x, const auto& w) {
    std::vector<Tensor> parts;
    int64_t begin = 0;
    for (size_t e = 0; e < count_E.size(); begin += count_E[e++]) {
      parts.push_back(at::matmul(x[0].narrow(0, begin, count_E[e]), w[0].select(0, static_cast<int64_t>(e)).t()));
    }
    return at::cat(parts, 0);
  };
  const auto experts = static_cast<int64_t>(count_E.size());
  expect_matches({{{rows, in}}, {{experts, out, in}}}, [&](const auto& x, auto& w) { return grouped_matmul(x[0], w[0], end); },
                 expert_by_expert);
}

TEST(GroupedMatmul, IsOneProductAnExpert) {
  expect_grouped({3, 5, 1}, 7, 9);
  expect_grouped({16, 32}, 64, 48);
  expect_grouped({4}, 5, 3);
}

TEST(GroupedMatmul, ExpertsWithoutRows) {
  expect_grouped({0, 3, 0, 0, 2, 0}, 7, 9);
  expect_grouped({0, 0, 5}, 7, 9);
}

TEST(GroupedMatmul, NoRowsAtAll) { expect_grouped({0, 0, 0}, 7, 9); }

TEST(GroupedMatmul, ExpertsWithoutRowsGetNoGradient) {
  Parameter weight = trained(normal({3, 4, 5}, 1));
  const Tensor x = normal({6, 5}, 2).requires_grad_();
  run_backward(grouped_matmul(x, weight, at::tensor({2, 2, 6}, at::kInt)), normal({6, 4}, 3));
  EXPECT_EQ(weight.main_grad.select(0, 1).abs().max().item<float>(), 0.0F);
  EXPECT_GT(weight.main_grad.select(0, 2).abs().min().item<float>(), 0.0F);
}

// Asked for by name, a kernel does what it is asked or says that it can't.
TEST(GroupedMatmul, OnACpuExpertsGoOneByOne) {
  Parameter weight = trained(normal({3, 16, 8}, 1, at::kBFloat16));
  const Tensor x = normal({6, 8}, 2, at::kBFloat16), dy = normal({6, 16}, 3, at::kBFloat16), end = at::tensor({2, 2, 6}, at::kInt);
  EXPECT_TRUE(grouped_product(x, weight.value, end, GroupedKernel::one_by_one).equal(grouped_product(x, weight.value, end)));
  for (const GroupedKernel kernel : {GroupedKernel::aten, GroupedKernel::wide, GroupedKernel::square}) {
    EXPECT_THROW(grouped_product(x, weight.value, end, kernel), std::logic_error);
    EXPECT_THROW(grouped_input_gradient(dy, weight.value, end, kernel), std::logic_error);
    EXPECT_THROW(add_grouped_weight_gradient(weight.main_grad, dy, x, end, kernel), std::logic_error);
  }
  EXPECT_EQ(weight.main_grad.abs().max().item<float>(), 0.0F);
}

}  // namespace
}  // namespace upcycle
