#include "model/weights.hpp"

#include <gtest/gtest.h>

#include "support/numbers.hpp"
#include "support/small_architecture.hpp"

namespace upcycle {
namespace {

const std::string kLayer = "model.layers.1.";

/// q, k, v side by side, a router, gate and up of the experts along their rows, a norm; as rank `rank` of `world` holds them.
struct Held {
  Layout layout;
  Weights weights;
  Parameter &qkv, &router, &gate_up, &norm;
  Held(int world, int rank, int64_t expert)
      : layout(Layout::even(Grid(parallel(expert), world), small())),
        weights(small(), layout, layout.grid.at(rank)),
        qkv(weights.add({kLayer + "self_attn.q_proj.weight", kLayer + "self_attn.k_proj.weight", kLayer + "self_attn.v_proj.weight"})),
        router(weights.add({kLayer + "mlp.gate.weight"})),
        gate_up(weights.add({kLayer + "mlp.experts.gate_proj.weight", kLayer + "mlp.experts.up_proj.weight"}, 1)),
        norm(weights.add({"model.norm.weight"})) {}
  static ParallelSection parallel(int64_t expert) {
    ParallelSection section;
    section.expert = expert;
    return section;
  }
};

TEST(Weights, PartsLieSideBySide) {
  Held held(4, 2, 4);  // the third quarter of the experts
  held.weights.allocate(at::kBFloat16, at::kCPU);
  EXPECT_EQ(held.qkv.value.sizes(), (Shape{24 + 12 + 12, 24}));
  EXPECT_EQ(held.gate_up.value.sizes(), (Shape{2, 20, 24}));
  const std::vector<Part>& parts = held.weights.all()[2].parts;
  ASSERT_EQ(parts.size(), 2U);
  EXPECT_EQ(parts[1].box, (Box{{4, 0, 0}, {2, 10, 24}}));
  parts[0].of(held.gate_up.master).fill_(1.0);
  parts[1].of(held.gate_up.master).fill_(2.0);
  EXPECT_EQ(held.gate_up.master[1][9][0].item<float>(), 1.0F);
  EXPECT_EQ(held.gate_up.master[1][10][0].item<float>(), 2.0F);
}

TEST(Weights, PrecisionsAndSharing) {
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    Held held(1, 0, 1);
    held.weights.allocate(compute, at::kCPU);
    for (Weight& weight : held.weights.all()) {
      const Parameter& p = weight.parameter;
      const bool fp32 = compute == at::kFloat || &p == &held.router;
      EXPECT_EQ(p.value.scalar_type(), fp32 ? at::kFloat : at::kBFloat16);
      EXPECT_EQ(p.master.scalar_type(), at::kFloat);
      EXPECT_EQ(p.main_grad.scalar_type(), at::kFloat);
      EXPECT_EQ(p.value.is_alias_of(p.master), fp32);
      EXPECT_EQ(p.main_grad.sizes(), p.value.sizes());
      EXPECT_EQ(p.main_grad.abs().sum().item<float>(), 0.0F);
    }
  }
}

TEST(Weights, WhatTheSameRanksHoldLiesInOneBucket) {
  Held held(4, 1, 2);
  held.weights.allocate(at::kFloat, at::kCPU);
  std::vector<Bucket>& buckets = held.weights.buckets();
  ASSERT_EQ(buckets.size(), 2U);
  Bucket &experts = buckets[0], &rest = buckets[1];   // backward is done with the experts before it is with q, k, v
  EXPECT_EQ(held.weights.groups().partitions()[rest.group], (Partition{0, 0, 0, 0}));
  EXPECT_EQ(held.weights.groups().partitions()[experts.group], (Partition{0, 1, 0, 1}));
  EXPECT_EQ(rest.place.holders, 4);
  EXPECT_EQ(rest.place.index, 1);
  EXPECT_EQ(experts.place.holders, 2);
  EXPECT_EQ(experts.place.index, 0);
  EXPECT_EQ(experts.weights, std::vector<size_t>{2});
  EXPECT_EQ(rest.weights, (std::vector<size_t>{3, 1, 0}));
  rest.gradients.fill_(1.0), experts.gradients.fill_(2.0);
  EXPECT_EQ(held.norm.main_grad.sum().item<float>(), 24.0F);
  EXPECT_EQ(held.gate_up.main_grad.min().item<float>(), 2.0F);
  rest.values.fill_(3.0);
  EXPECT_EQ(held.qkv.value.min().item<float>(), 3.0F);
}

TEST(Weights, PublishRoundsAndMastersCanStandIn) {
  for (const int64_t zero : {0, 1}) {
    Held held(2, 1, 1);
    held.weights.allocate(at::kBFloat16, at::kCPU, zero);
    for (Weight& weight : held.weights.all()) weight.parameter.master.copy_(normal(weight.shape, 3));
    held.weights.publish();
    EXPECT_TRUE(held.qkv.value.equal(held.qkv.master.to(at::kBFloat16)));
    EXPECT_TRUE(held.router.value.equal(held.router.master));
    const Tensor before = held.qkv.value;
    {
      const ComputeWithMasters guard(held.weights);
      EXPECT_TRUE(held.qkv.value.is_same(held.qkv.master));
      EXPECT_TRUE(held.router.value.is_same(held.router.master));
    }
    EXPECT_TRUE(held.qkv.value.is_same(before));
  }
}

TEST(Weights, WithZeroEachHolderKeepsItsPartOfTheMasters) {
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    for (const int rank : {0, 1, 3}) {
      Held held(4, rank, 2);
      held.weights.allocate(compute, at::kCPU, 1);
      for (Weight& weight : held.weights.all()) weight.parameter.master.copy_(normal(weight.shape, 3));
      held.weights.publish();
      std::vector<Tensor> whole;
      for (const Bucket& bucket : held.weights.buckets()) whole.push_back(bucket.masters.clone());
      held.weights.start_training();
      for (size_t i = 0; i < whole.size(); ++i) {
        const Bucket& bucket = held.weights.buckets()[i];
        EXPECT_TRUE(bucket.divided());
        EXPECT_EQ(bucket.masters.numel() * bucket.place.holders, bucket.size);
        EXPECT_TRUE(bucket.masters.equal(whole[i].narrow(0, bucket.own.begin, bucket.own.size())));
        EXPECT_EQ(bucket.masters.is_alias_of(bucket.values), bucket.dtype == at::kFloat);
        EXPECT_FALSE(bucket.masters.is_alias_of(bucket.gradients));
        EXPECT_EQ(bucket.gradients.abs().sum().item<float>(), 0.0F);
        EXPECT_EQ(bucket.values.numel(), bucket.size);
      }
      for (Weight& weight : held.weights.all()) EXPECT_EQ(weight.parameter.main_grad.sizes(), weight.shape);
      // An update of what it owns reaches the values there, and nothing else.
      Bucket& rest = held.weights.buckets().back();
      const Tensor values = rest.values.clone();
      rest.masters.fill_(5.0);
      held.weights.publish();
      EXPECT_EQ(rest.values.narrow(0, rest.own.begin, rest.own.size()).min().item<float>(), 5.0F);
      EXPECT_TRUE(rest.values.narrow(0, 0, rest.own.begin).equal(values.narrow(0, 0, rest.own.begin)));
      if (compute == at::kBFloat16) {
        EXPECT_THROW(ComputeWithMasters{held.weights}, std::logic_error);
      }
    }
  }
}

TEST(Weights, NamesOutsideTheModelAreFaults) {
  Held held(1, 0, 1);
  EXPECT_THROW(held.weights.add({"model.layers.7.mlp.gate.weight"}), std::out_of_range);
  ParallelSection two_stages;
  two_stages.pipeline = 2;
  const Layout layout = Layout::even(Grid(two_stages, 2), small());
  Weights last(small(), layout, layout.grid.at(1));
  EXPECT_THROW(last.add({"model.layers.0.input_layernorm.weight"}), std::logic_error);
}

}  // namespace
}  // namespace upcycle
