// rms_norm, swiglu, rotate
#include <ATen/ops/cat.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>

#include <cmath>

#include "ops/rms_norm.hpp"
#include "ops/rope.hpp"
#include "ops/swiglu.hpp"
#include "unit/ops/reference.hpp"

namespace upcycle {
namespace {

TEST(RmsNorm, IsTheFormula) {
  constexpr double kEps = 1e-2;  // large enough to matter
  const Op ours = [](const auto& x, auto& w) { return rms_norm(x[0], w[0], kEps); };
  const Formula formula = [](const auto& x, const auto& w) {
    return w[0] * x[0] * at::rsqrt(x[0].square().mean(-1, true) + kEps);
  };
  expect_matches({{{5, 33}}, {{33}}, 2}, ours, formula);
  expect_matches({{{2, 3, 4, 7}}, {{7}}, 2}, ours, formula);
  expect_matches({{{0, 7}}, {{7}}, 2}, ours, formula);
}

TEST(RmsNorm, OfAViewAndBesideAnotherUseOfItsInput) {  // heads of q inside qkv; the residual stream
  expect_matches({{{5, 12}}, {{4}}, 3}, [](const auto& x, auto& w) { return rms_norm(x[0].narrow(1, 3, 4), w[0], 1e-6) * x[0].narrow(1, 3, 4); },
                 [](const auto& x, const auto& w) {
                   const Tensor part = x[0].narrow(1, 3, 4);
                   return w[0] * part * at::rsqrt(part.square().mean(-1, true) + 1e-6) * part;
                 });
}

// transformers: weight * x.to(dtype), so that the product is of two bf16 numbers.
TEST(RmsNorm, RoundsBeforeTheWeight) {
  Parameter weight = trained(normal({33}, 1, at::kBFloat16));
  const Tensor x = normal({5, 33}, 2, at::kBFloat16), x32 = x.to(at::kFloat);
  const Tensor expected = weight.value * (x32 * at::rsqrt(x32.square().mean(-1, true) + 1e-6)).to(at::kBFloat16);
  EXPECT_TRUE(rms_norm(x, weight, 1e-6).equal(expected));
}

TEST(Swiglu, IsTheFormula) {
  const Op ours = [](const auto& x, auto&) { return swiglu(x[0]); };
  const Formula formula = [](const auto& x, const auto&) {
    const int64_t width = x[0].size(-1) / 2;
    const Tensor gate = x[0].narrow(-1, 0, width), up = x[0].narrow(-1, width, width);
    return gate * at::sigmoid(gate) * up;
  };
  expect_matches({{{5, 34}}, {}, 2}, ours, formula);
  expect_matches({{{2, 3, 2}}, {}, 2}, ours, formula);
  expect_matches({{{0, 34}}, {}, 2}, ours, formula);
}

/// Pair (d, d + D/2) at position s turned by s * theta^(-2d/D), number by number.
Tensor turned(const Tensor& x_BSHD, double theta) {
  const int64_t width = x_BSHD.size(3), half = width / 2;
  std::vector<Tensor> positions;
  for (int64_t s = 0; s < x_BSHD.size(1); ++s) {
    std::vector<Tensor> first, second;
    for (int64_t d = 0; d < half; ++d) {
      const double angle = static_cast<double>(s) * std::pow(theta, -2.0 * static_cast<double>(d) / static_cast<double>(width));
      const Tensor a = x_BSHD.select(1, s).select(-1, d), b = x_BSHD.select(1, s).select(-1, d + half);
      first.push_back(a * std::cos(angle) - b * std::sin(angle));
      second.push_back(b * std::cos(angle) + a * std::sin(angle));
    }
    first.insert(first.end(), second.begin(), second.end());
    positions.push_back(at::stack(first, -1));
  }
  return at::stack(positions, 1);
}

TEST(Rope, TurnsPairsHalfAHeadApart) {
  for (const Shape& shape : {Shape{2, 9, 3, 10}, Shape{1, 1, 1, 2}}) {
    const RotaryTable table = rotary_table(shape[1], shape[3], 1e4, at::kCPU);
    expect_matches({{shape}, {}, 1}, [&](const auto& x, auto&) { return rotate(x[0], table); },
                   [](const auto& x, const auto&) { return turned(x[0], 1e4); });
  }
}

TEST(Rope, KeepsLengthsAndDependsOnDistanceOnly) {
  const RotaryTable table = rotary_table(40, 16, 1e6, at::kCPU);
  const Tensor q = normal({1, 1, 1, 16}, 1).expand({1, 40, 1, 16}), k = normal({1, 1, 1, 16}, 2).expand({1, 40, 1, 16});
  const Tensor q_turned = rotate(q, table), k_turned = rotate(k, table);
  EXPECT_LE(distance(q_turned.norm(2, -1), q.norm(2, -1)), 1e-6);
  const auto product = [&](int64_t i, int64_t j) {
    return (q_turned.select(1, i) * k_turned.select(1, j)).sum().item<double>();
  };
  EXPECT_NEAR(product(7, 3), product(36, 32), 1e-4);
  EXPECT_GT(std::abs(product(7, 3) - product(7, 4)), 1e-2);
}

}  // namespace
}  // namespace upcycle
