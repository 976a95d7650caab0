#include "ops/linear.hpp"

#include <ATen/ops/matmul.h>

#include "unit/ops/reference.hpp"

namespace upcycle {
namespace {

Tensor product(const std::vector<Tensor>& x, const std::vector<Tensor>& w) { return at::matmul(x[0], w[0].t()); }
Tensor ours(const std::vector<Tensor>& x, std::vector<Parameter>& w) { return linear(x[0], w[0]); }

TEST(Linear, IsTheProduct) {
  expect_matches({{{7, 13}}, {{5, 13}}}, ours, product);
  expect_matches({{{2, 3, 33}}, {{65, 33}}}, ours, product);
  expect_matches({{{1, 1}}, {{1, 1}}}, ours, product);
}

TEST(Linear, TakesAProductThatIsMade) {  expect_matches({{{7, 13}}, {{5, 13}}}, [](const auto& x, auto& w) { return linear(x[0], w[0], at::matmul(x[0].detach(), w[0].value.t())); }, product);
  Parameter weight = trained(normal({5, 13}, 1));
  const Tensor made = normal({7, 5}, 2);
  EXPECT_TRUE(linear(normal({7, 13}, 3), weight, made).equal(made)) << "it is not made again";
}

TEST(Linear, TakesZeroRows) { expect_matches({{{0, 13}}, {{5, 13}}}, ours, product); }

// A column-major or expanded gradient is what a sum or a transpose hands back.
TEST(Linear, TakesStridedInputsAndGradients) {
  expect_matches({{{13, 7}}, {{5, 13}}}, [](const auto& x, auto& w) { return linear(x[0].t(), w[0]).t(); },
                 [](const auto& x, const auto& w) { return at::matmul(x[0].t(), w[0].t()).t(); });
  expect_matches({{{7, 13}}, {{5, 13}}, 2, 2e-6}, [](const auto& x, auto& w) { return linear(x[0], w[0]).sum(); },
                 [](const auto& x, const auto& w) { return at::matmul(x[0], w[0].t()).sum(); });
}

TEST(Linear, OneWeightTwiceInOneGraph) {
  Parameter weight = trained(normal({6, 6}, 1));
  const Tensor x = normal({4, 6}, 2).requires_grad_();
  const Tensor w64 = weight.value.to(at::kDouble).requires_grad_(), x64 = x.detach().to(at::kDouble).requires_grad_();
  const Tensor dy = normal({4, 6}, 3);
  run_backward(linear(linear(x, weight), weight), dy);
  run_backward(at::matmul(at::matmul(x64, w64.t()), w64.t()), dy.to(at::kDouble));
  EXPECT_LE(distance(weight.main_grad, w64.grad()), 1e-6);
  EXPECT_LE(distance(x.grad(), x64.grad()), 1e-6);
}

// A router: weights in fp32, activations in bf16, of which no fp32 copy is kept.
TEST(Linear, TakesAnInputOfAnotherDtype) {
  Parameter weight = trained(normal({6, 5}, 1)), same = trained(weight.value);
  const Tensor x = normal({4, 5}, 2, at::kBFloat16).requires_grad_(), x32 = x.detach().to(at::kFloat).requires_grad_();
  const Tensor y = linear(x, weight), y32 = linear(x32, same), dy = normal({4, 6}, 3);
  EXPECT_TRUE(y.equal(y32));
  run_backward(y, dy);
  run_backward(y32, dy);
  EXPECT_TRUE(weight.main_grad.equal(same.main_grad));
  EXPECT_TRUE(x.grad().equal(x32.grad().to(at::kBFloat16)));
}

// Summed over 512 micro-batches: a bf16 sum would stop growing after 256 equal additions.
TEST(Linear, GradientsOfBf16AreSummedInFp32) {
  Parameter weight = trained(normal({1, 1}, 1, at::kBFloat16));
  const Tensor one = at::zeros({1, 1}, at::kBFloat16).add_(1.0);
  for (int pass = 0; pass < 512; ++pass) add_weight_gradient(weight.main_grad, one, one);
  EXPECT_EQ(weight.main_grad.item<float>(), 512.0F);
}

}  // namespace
}  // namespace upcycle
