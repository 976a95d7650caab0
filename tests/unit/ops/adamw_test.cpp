#include "ops/adamw.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>

#include <cmath>

#include "ops/sums_of_squares.hpp"
#include "unit/ops/reference.hpp"

namespace upcycle {
namespace {

constexpr AdamW kSettings = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
const std::vector<Shape> kShapes = {{7, 5}, {3}, {1, 1}, {0}, {33, 17}};

Tensor scalar(double value) { return at::full({}, value, at::TensorOptions(at::kFloat)); }

/// torch.optim.AdamW, in fp64.
struct Reference {
  std::vector<Tensor> master, m, v;
  void step(const std::vector<Tensor>& gradients, double divisor, int64_t t) {
    const AdamW& s = kSettings;
    for (size_t i = 0; i < master.size(); ++i) {
      const Tensor g = gradients[i].to(at::kDouble) / divisor;
      master[i].mul_(1 - s.lr * s.weight_decay);
      m[i].mul_(s.beta1).add_(g, 1 - s.beta1);
      v[i].mul_(s.beta2).add_(g * g, 1 - s.beta2);
      const Tensor root = (v[i] / (1 - std::pow(s.beta2, t))).sqrt() + s.eps;
      master[i].sub_(m[i] / (1 - std::pow(s.beta1, t)) / root * s.lr);
    }
  }
};

struct Tensors {
  std::vector<Tensor> master, gradient, m, v;
  Tensors() {
    for (size_t i = 0; i < kShapes.size(); ++i) {
      master.push_back(normal(kShapes[i], i));
      gradient.push_back(normal(kShapes[i], 50 + i));
      m.push_back(at::zeros(kShapes[i]));
      v.push_back(at::zeros(kShapes[i]));
    }
  }
  std::vector<Tensor> copies(const std::vector<Tensor>& of) const {
    std::vector<Tensor> out;
    for (const Tensor& tensor : of) out.push_back(tensor.to(at::kDouble).clone());
    return out;
  }
};

Tensor joined(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> flat;
  for (const Tensor& tensor : tensors) flat.push_back(tensor.reshape({-1}));
  return at::cat(flat);
}

TEST(AdamW, IsTorchsFormula) {
  Tensors ours;
  Reference reference{ours.copies(ours.master), ours.copies(ours.m), ours.copies(ours.v)};
  for (int64_t t = 1; t <= 12; ++t) {
    const double divisor = t % 3 == 0 ? 4.0 : 1.0;  // clipped steps among others
    for (size_t i = 0; i < kShapes.size(); ++i) ours.gradient[i].copy_(normal(kShapes[i], 100 * t + i));
    reference.step(ours.gradient, divisor, t);
    adamw_step(kSettings, ours.master, ours.gradient, ours.m, ours.v, scalar(static_cast<double>(t)), scalar(divisor), scalar(0));
    EXPECT_LE(distance(joined(ours.master), joined(reference.master)), 1e-6) << "step " << t;
    EXPECT_LE(distance(joined(ours.m), joined(reference.m)), 1e-6) << "step " << t;
    EXPECT_LE(distance(joined(ours.v), joined(reference.v)), 1e-6) << "step " << t;
  }
}

TEST(AdamW, SkipChangesNothing) {
  Tensors ours;
  for (Tensor& gradient : ours.gradient) gradient.fill_(NAN);
  const auto master = ours.copies(ours.master), m = ours.copies(ours.m), v = ours.copies(ours.v);
  adamw_step(kSettings, ours.master, ours.gradient, ours.m, ours.v, scalar(1), scalar(2), scalar(1));
  for (size_t i = 0; i < kShapes.size(); ++i) {
    EXPECT_TRUE(ours.master[i].to(at::kDouble).equal(master[i]));
    EXPECT_TRUE(ours.m[i].to(at::kDouble).equal(m[i]));
    EXPECT_TRUE(ours.v[i].to(at::kDouble).equal(v[i]));
  }
}

TEST(AdamW, DividesTheGradientsInPlace) {
  Tensors ours;
  const auto before = ours.copies(ours.gradient);
  adamw_step(kSettings, ours.master, ours.gradient, ours.m, ours.v, scalar(1), scalar(4), scalar(0));
  for (size_t i = 0; i < kShapes.size(); ++i) EXPECT_TRUE(ours.gradient[i].to(at::kDouble).equal(before[i] / 4));
}

TEST(AdamW, WritesThroughViewsAndTakesNothing) {
  Tensor flat = normal({10}, 1);
  const Tensor before = flat.clone();
  adamw_step(kSettings, {flat.narrow(0, 2, 4)}, {normal({4}, 2)}, {at::zeros({4})}, {at::zeros({4})}, scalar(1), scalar(1), scalar(0));
  EXPECT_TRUE(flat.narrow(0, 0, 2).equal(before.narrow(0, 0, 2)));
  EXPECT_TRUE(flat.narrow(0, 6, 4).equal(before.narrow(0, 6, 4)));
  EXPECT_FALSE(flat.narrow(0, 2, 4).equal(before.narrow(0, 2, 4)));
  adamw_step(kSettings, {}, {}, {}, {}, scalar(1), scalar(1), scalar(0));
}

// Weights end to end, with gaps of zeros: every run as adamw_step would move it alone with its own settings, bit for bit.
TEST(AdamWBuffer, MovesEachRunByItsOwnSettings) {
  const std::vector<AdamWRun> runs = {{0, 37, 1.0, true}, {64, 100, 1.0, false}, {128, 128, 3.0, false}, {128, 131, 0.1, false}, {192, 256, 1.0, true}};
  Tensor inside = at::zeros({256});
  for (const AdamWRun& run : runs) inside.narrow(0, run.begin, run.end - run.begin).fill_(1.0);
  Tensor master = normal({256}, 1) * inside, gradient = normal({256}, 2) * inside, m = normal({256}, 3) * inside, v = normal({256}, 4).abs() * inside;
  Tensor values = at::zeros({256}, at::kBFloat16);
  const std::vector<Tensor> before = {master.clone(), gradient.clone(), m.clone(), v.clone()};
  const AdamWBuffer buffer(master, gradient, m, v, values, runs);
  buffer.step(kSettings, scalar(3), scalar(2), scalar(1));
  EXPECT_TRUE(master.equal(before[0]) && m.equal(before[2]) && v.equal(before[3])) << "skipped";
  buffer.step(kSettings, scalar(3), scalar(2), scalar(0));
  for (const AdamWRun& run : runs) {
    const auto of = [&](const Tensor& flat) { return flat.narrow(0, run.begin, run.end - run.begin); };
    std::vector<Tensor> alone;
    for (const Tensor& x : before) alone.push_back(of(x).clone());
    AdamW settings = kSettings;
    settings.lr *= run.lr_scale;
    if (!run.decays) settings.weight_decay = 0.0;
    adamw_step(settings, {alone[0]}, {alone[1]}, {alone[2]}, {alone[3]}, scalar(3), scalar(2), scalar(0));
    EXPECT_TRUE(of(master).equal(alone[0]) && of(m).equal(alone[2]) && of(v).equal(alone[3])) << run.begin;
  }
  EXPECT_TRUE(values.equal(master.to(at::kBFloat16)));
  EXPECT_EQ((master * (1 - inside)).abs().sum().item<float>(), 0.0F);
}

TEST(AdamWBuffer, RefusesWhatDoesNotFit) {
  const auto flat = [](int64_t size) { return at::zeros({size}); };
  EXPECT_THROW(AdamWBuffer(flat(8), flat(8), flat(8), flat(7), {}, {}), std::logic_error);
  EXPECT_THROW(AdamWBuffer(flat(8), flat(8), flat(8), flat(8), {}, {{2, 8, 1.0, true}}), std::logic_error);
  EXPECT_THROW(AdamWBuffer(flat(8), flat(8), flat(8), flat(8), {}, {{4, 9, 1.0, true}}), std::logic_error);
  EXPECT_THROW(AdamWBuffer(flat(8), flat(8).to(at::kDouble), flat(8), flat(8), {}, {}), std::logic_error);
}

TEST(SumsOfSquares, CountSharesOnce) {
  const std::vector<Tensor> all = {normal({1000}, 1), normal({3}, 2), at::zeros({0}), normal({64}, 4)};
  const std::vector<double> shares = {1.0, 0.5, 1.0, 0.25};
  double expected = 0.0;
  for (size_t i = 0; i < all.size(); ++i) expected += shares[i] * all[i].to(at::kDouble).square().sum().item<double>();
  const Tensor sums = sums_of_squares(all, shares);
  EXPECT_EQ(sums.scalar_type(), at::kDouble);
  EXPECT_EQ(sums.dim(), 1);
  EXPECT_NEAR(sums.sum().item<double>(), expected, 1e-6 * expected);
  EXPECT_TRUE(std::isnan(sums_of_squares({at::full({5}, NAN)}, {1.0}).sum().item<double>()));
  EXPECT_THROW(sums_of_squares({}, {}), std::logic_error);
}

}  // namespace
}  // namespace upcycle
