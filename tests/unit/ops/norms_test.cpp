// rms_norm, alone, beside its input and behind a sum; rotate; qk_norm_rope
#include <ATen/ops/cat.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/stack.h>

#include <cmath>

#include "ops/qk_norm_rope.hpp"
#include "ops/rms_norm.hpp"
#include "support/tensors.hpp"
#include "unit/ops/reference.hpp"

namespace upcycle {
namespace {

Tensor norm64(const Tensor& x, const Tensor& w, double eps) { return w * x * at::rsqrt(x.square().mean(-1, true) + eps); }

TEST(RmsNorm, IsTheFormula) {
  constexpr double kEps = 1e-2;  // large enough to matter
  const Op ours = [](const auto& x, auto& w) { return rms_norm(x[0], w[0], kEps); };
  const Formula formula = [](const auto& x, const auto& w) { return norm64(x[0], w[0], kEps); };
  expect_matches({{{5, 33}}, {{33}}, 2}, ours, formula);
  expect_matches({{{2, 3, 4, 7}}, {{7}}, 2}, ours, formula);
  expect_matches({{{0, 7}}, {{7}}, 2}, ours, formula);
}

TEST(RmsNorm, OfAViewAndBesideAnotherUseOfItsInput) {  // heads of q inside qkv; the residual stream
  expect_matches({{{5, 12}}, {{4}}, 3}, [](const auto& x, auto& w) { return rms_norm(x[0].narrow(1, 3, 4), w[0], 1e-6) * x[0].narrow(1, 3, 4); },
                 [](const auto& x, const auto& w) {
                   const Tensor part = x[0].narrow(1, 3, 4);
                   return norm64(part, w[0], 1e-6) * part;
                 });
}

// transformers: weight * x.to(dtype), so that the product is of two bf16 numbers.
TEST(RmsNorm, RoundsBeforeTheWeight) {
  Parameter weight = trained(normal({33}, 1, at::kBFloat16));
  const Tensor x = normal({5, 33}, 2, at::kBFloat16), x32 = x.to(at::kFloat);
  const Tensor expected = weight.value * (x32 * at::rsqrt(x32.square().mean(-1, true) + 1e-6)).to(at::kBFloat16);
  EXPECT_TRUE(rms_norm(x, weight, 1e-6).equal(expected));
}

TEST(RmsNorm, BesideItsInput) {
  expect_matches({{{5, 12}}, {{12}}, 3}, [](const auto& x, auto& w) {
                   const auto [same, norm] = rms_norm_beside(x[0], w[0], 1e-6);
                   return same * norm;
                 },
                 [](const auto& x, const auto& w) { return x[0] * norm64(x[0], w[0], 1e-6); });
}

TEST(RmsNorm, BehindASum) {
  const Op ours = [](const auto& x, auto& w) {
    const auto [sum, norm] = add_rms_norm(x[0], x[1], w[0], 1e-6);
    return sum * norm;
  };
  const Formula formula = [](const auto& x, const auto& w) { return (x[0] + x[1]) * norm64(x[0] + x[1], w[0], 1e-6); };
  expect_matches({{{2, 5, 12}, {2, 5, 12}}, {{12}}, 5}, ours, formula);
  expect_matches({{{0, 12}, {0, 12}}, {{12}}, 5}, ours, formula);
}

TEST(RmsNorm, OneOfBothIsEnough) {
  expect_matches({{{5, 12}, {5, 12}}, {{12}}, 3}, [](const auto& x, auto& w) { return add_rms_norm(x[0], x[1], w[0], 1e-6).norm_D; },
                 [](const auto& x, const auto& w) { return norm64(x[0] + x[1], w[0], 1e-6); });
  expect_matches({{{5, 12}, {5, 12}}, {{12}}, 1}, [](const auto& x, auto& w) { return add_rms_norm(x[0], x[1], w[0], 1e-6).x_D; },
                 [](const auto& x, const auto& w) { return x[0] + x[1] + 0 * w[0]; });
}

// What is computed again for backward is rms_norm of the kept sum.
TEST(RmsNorm, BehindASumIsTheNormOfTheSum) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Parameter weight = trained(normal({33}, 1, dtype));
    const Tensor x = normal({5, 33}, 2, dtype), branch = normal({5, 33}, 3, dtype);
    const auto [sum, norm] = add_rms_norm(x, branch, weight, 1e-6);
    EXPECT_TRUE(same_bits(sum, x + branch));
    EXPECT_TRUE(same_bits(norm, rms_norm(x + branch, weight, 1e-6)));
  }
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

/// Two sequences of five positions, three heads of q and two of k and v, each six wide; what comes out, one row after another.
struct Case {
  static constexpr int64_t kSequences = 2, kPositions = 5, kHeads = 3, kKvHeads = 2, kWidth = 6;
  static constexpr double kEps = 1e-2, kTheta = 1e2;   // large enough to matter; small enough that no pair stands still
  static Shape qkv() { return {kSequences * kPositions, (kHeads + 2 * kKvHeads) * kWidth}; }
  static HeadColumns columns() { return {kSequences, kHeads, kKvHeads, kEps, rotary_table(kPositions, kWidth, kTheta, at::kCPU)}; }
  static Tensor heads(const Tensor& qkv, int64_t first, int64_t count) {
    return qkv.narrow(1, first * kWidth, count * kWidth).reshape({kSequences, kPositions, count, kWidth});
  }
  static Tensor q64(const Tensor& qkv, const Tensor& w) { return turned(norm64(heads(qkv, 0, kHeads), w, kEps), kTheta); }
  static Tensor k64(const Tensor& qkv, const Tensor& w) { return turned(norm64(heads(qkv, kHeads, kKvHeads), w, kEps), kTheta); }
  static Tensor v64(const Tensor& qkv) { return heads(qkv, kHeads + kKvHeads, kKvHeads); }
};

TEST(QkNormRope, IsTheNormAndTheRotationOfQAndKAndLeavesV) {
  const auto flat = [](const Tensor& q, const Tensor& k, const Tensor& v) { return at::cat({q.flatten(2), k.flatten(2), v.flatten(2)}, 2); };
  expect_matches({{Case::qkv()}, {{Case::kWidth}, {Case::kWidth}}, 3}, [&](const auto& x, auto& w) {
                   const auto [q, k, v] = qk_norm_rope(x[0], w[0], w[1], Case::columns());
                   return flat(q, k, v);
                 },
                 [&](const auto& x, const auto& w) { return flat(Case::q64(x[0], w[0]), Case::k64(x[0], w[1]), Case::v64(x[0])); });
}

TEST(QkNormRope, EachOfThemAloneIsEnough) {
  const Problem problem{{Case::qkv()}, {{Case::kWidth}, {Case::kWidth}}, 3};
  const auto ours = [](Tensor Heads::*which) {
    return [which](const auto& x, auto& w) { return qk_norm_rope(x[0], w[0], w[1], Case::columns()).*which; };
  };
  const auto none = [](const Tensor& w) { return 0 * w.sum(); };
  expect_matches(problem, ours(&Heads::q_BSHD), [&](const auto& x, const auto& w) { return Case::q64(x[0], w[0]) + none(w[1]); });
  expect_matches(problem, ours(&Heads::k_BSGD), [&](const auto& x, const auto& w) { return Case::k64(x[0], w[1]) + none(w[0]); });
  expect_matches(problem, ours(&Heads::v_BSGD), [&](const auto& x, const auto& w) { return Case::v64(x[0]) + none(w[0]) + none(w[1]); });
}

// Attention hands back gradients with heads before positions, and narrow pieces of larger ones.
TEST(QkNormRope, TakesGradientsAsTheyLie) {
  expect_matches({{Case::qkv()}, {{Case::kWidth}, {Case::kWidth}}, 4}, [](const auto& x, auto& w) {
                   const auto [q, k, v] = qk_norm_rope(x[0], w[0], w[1], Case::columns());
                   const Tensor both = at::cat({k, v}, 2).transpose(1, 2);
                   return q.transpose(1, 2).narrow(1, 0, 2) * both.narrow(1, 0, 2) * both.narrow(1, 2, 2);
                 },
                 [](const auto& x, const auto& w) {
                   return (Case::q64(x[0], w[0]).narrow(2, 0, 2) * Case::k64(x[0], w[1]) * Case::v64(x[0])).transpose(1, 2);
                 });
}

TEST(QkNormRope, RoundsAsItsPartsDoAndGivesTheSameBitsAgain) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Parameter q_norm = trained(normal({Case::kWidth}, 1, dtype)), k_norm = trained(normal({Case::kWidth}, 2, dtype));
    const Tensor qkv = normal(Case::qkv(), 3, dtype);
    const HeadColumns columns = Case::columns();
    const auto [q, k, v] = qk_norm_rope(qkv, q_norm, k_norm, columns);
    EXPECT_TRUE(same_bits(q, rotate(rms_norm(Case::heads(qkv, 0, 3), q_norm, Case::kEps), columns.rotary)));
    EXPECT_TRUE(same_bits(k, rotate(rms_norm(Case::heads(qkv, 3, 2), k_norm, Case::kEps), columns.rotary)));
    EXPECT_TRUE(v.is_alias_of(qkv));
    EXPECT_TRUE(same_bits(normed_q(qkv, q_norm, columns), q));
    EXPECT_TRUE(same_bits(normed_k(qkv, k_norm, columns), k));
    EXPECT_TRUE(q.is_contiguous() && k.is_contiguous());
  }
}

}  // namespace
}  // namespace upcycle
