#include "train/optimizer.hpp"

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "support/numbers.hpp"
#include "support/small_architecture.hpp"

namespace upcycle {
namespace {

OptimizerSection clipping() {
  OptimizerSection settings;
  settings.clip = 1.0, settings.weight_decay = 0.1;
  return settings;
}

/// Matrices and what lies between them: a norm and a router, a norm at the end.
struct Trained {
  Layout layout{Layout::even(Grid(ParallelSection{}, 1), small())};
  Weights weights{small(), layout, layout.grid.at(0)};
  Parameter &qkv, &first_norm, &router, &gate_up, &last_norm;
  Optimizer optimizer;
  explicit Trained(at::ScalarType compute)
      : qkv(weights.add({"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"})),
        first_norm(weights.add({"model.layers.1.post_attention_layernorm.weight"})),
        router(weights.add({"model.layers.1.mlp.gate.weight"})),
        gate_up(weights.add({"model.layers.1.mlp.experts.gate_proj.weight", "model.layers.1.mlp.experts.up_proj.weight"}, 1)),
        last_norm(weights.add({"model.norm.weight"})),
        optimizer((allocate(compute), weights), clipping(), /*router_lr_scale=*/0.3) {}
  void allocate(at::ScalarType compute) {
    weights.allocate(compute, at::kCPU);
    uint64_t seed = 1;
    for (Bucket& bucket : weights.buckets()) {
      for (size_t i = 0; i < bucket.weights.size(); ++i) bucket.masters.narrow(0, bucket.runs[i].begin, bucket.runs[i].size()).copy_(normal({bucket.runs[i].size()}, ++seed));
    }
    weights.publish();
  }
  void add(int step) {
    uint64_t seed = 100 * static_cast<uint64_t>(step);
    for (Weight& weight : weights.all()) weight.parameter.sums().add_(normal(weight.shape, ++seed));
  }
};

TEST(Optimizer, MatricesAreOverwrittenAndTheRestIsZeroed) {
  Trained t(at::kBFloat16);
  for (Bucket& bucket : t.weights.buckets()) bucket.gradients.fill_(7.0);
  t.optimizer.zero_gradients();
  for (const Parameter* matrix : {&t.qkv, &t.gate_up}) {
    EXPECT_TRUE(matrix->outdated);
    EXPECT_EQ(matrix->main_grad.min().item<float>(), 7.0F) << "nobody has touched it";
  }
  for (const Parameter* other : {&t.first_norm, &t.router, &t.last_norm}) {
    EXPECT_FALSE(other->outdated);
    EXPECT_EQ(other->main_grad.abs().max().item<float>(), 0.0F);
  }
  t.qkv.main_grad.fill_(NAN);
  EXPECT_EQ(t.qkv.sums().abs().max().item<float>(), 0.0F);
  EXPECT_FALSE(t.qkv.overwrites()) << "once a step";
  EXPECT_THROW(t.optimizer.squared_norm_share(), std::logic_error) << "gate and up hold an earlier step's sums";
  EXPECT_TRUE(t.gate_up.overwrites());
  EXPECT_NO_THROW(t.optimizer.squared_norm_share());
}

// What a product says of the squares that it wrote is taken for read, until something is added.
TEST(Optimizer, SquaresThatAreKnownAreNotReadAgain) {
  Trained t(at::kBFloat16);
  t.optimizer.zero_gradients();
  t.add(1);
  const double all = t.optimizer.squared_norm_share().item<double>(), own = t.gate_up.main_grad.to(at::kDouble).square().sum().item<double>();
  t.gate_up.squares = at::full({4}, 0.25 * own + 8.0, at::kDouble);
  EXPECT_NEAR(t.optimizer.squared_norm_share().item<double>(), all + 32.0, 1e-5 * all);
  t.gate_up.sums();
  EXPECT_EQ(t.optimizer.squared_norm_share().item<double>(), all);
  t.gate_up.squares = at::full({}, 1e9, at::kDouble);
  EXPECT_TRUE(!t.gate_up.overwrites() && !t.gate_up.squares.defined());
  t.qkv.squares = at::full({}, 1e9, at::kDouble);
  EXPECT_EQ(t.optimizer.squared_norm_share().item<double>(), all) << "only experts' products tell, and others' are summed together";
}

// Steps whose gradients are zeroed throughout give the same bits; so do those after a bad one, and after additions that no step has used.
TEST(Optimizer, NothingOfAnEarlierStepIsLeft) {
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    Trained lazy(compute), zeroed(compute);
    for (int step = 1; step <= 5; ++step) {
      SCOPED_TRACE(step);
      if (step == 4) {
        lazy.optimizer.zero_gradients();
        lazy.add(50);
      }
      lazy.optimizer.zero_gradients();
      for (Bucket& bucket : zeroed.weights.buckets()) bucket.gradients.zero_();
      for (Trained* t : {&lazy, &zeroed}) {
        t->add(step);
        if (step == 2) t->gate_up.main_grad.fill_(NAN);
        t->optimizer.step(1e-2, t->optimizer.squared_norm_share());
      }
      EXPECT_EQ(lazy.optimizer.updates().item<float>(), step < 2 ? step : step - 1);
      for (size_t i = 0; i < lazy.weights.all().size(); ++i) {
        const Parameter &a = lazy.weights.all()[i].parameter, &b = zeroed.weights.all()[i].parameter;
        EXPECT_TRUE(a.master.equal(b.master) && a.value.equal(b.value)) << lazy.weights.all()[i].spec().name;
      }
    }
  }
}

}  // namespace
}  // namespace upcycle
