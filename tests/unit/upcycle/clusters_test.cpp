// Clusters of hidden units. f units, G clusters, h hidden
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "unit/upcycle/model.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

/// Gate and up of one layer, f units in G planted groups: each group has a direction of its own, each unit adds noise to it.
struct Planted {
  Planted(int64_t f, int64_t G, int64_t h, double noise) : group(shuffled(f, Random(9, "where units go"))) {
    for (int64_t& g : group) g %= G;
    for (const char* matrix : {"gate", "up"}) {
      const Random direction(1, matrix), own(2, matrix);
      Tensor& rows = tensors["model.layers.0.mlp." + std::string(matrix) + "_proj.weight"] = at::empty({f, h}, at::kFloat);
      float* const data = rows.data_ptr<float>();
      for (int64_t u = 0; u < f; ++u) {
        const double length = 0.2 + own.uniform(static_cast<uint64_t>(1000000 + u));   // lengths say nothing
        for (int64_t i = 0; i < h; ++i) {
          const auto of_group = static_cast<uint64_t>(group[static_cast<size_t>(u)] * h + i), of_unit = static_cast<uint64_t>(u * h + i);
          data[u * h + i] = static_cast<float>(length * (direction.normal(of_group) + noise * own.normal(of_unit)));
        }
      }
    }
  }
  ReadDense reader() const {
    return [this](const std::string& name, const Box& box) { return slice(tensors.at(name), box); };
  }
  std::vector<int64_t> group;
  std::map<std::string, Tensor> tensors;
};

Recipe of_one_layer(int64_t f, int64_t G, int64_t h) {
  Architecture a = dense_architecture();
  a.ffn = f, a.hidden = h, a.layers = 1;
  RunConfig config = run(2 * G, G, G);
  config.upcycle.permutation = UnitOrder::clusters;
  return make_recipe(a, config);
}

/// How many of the G shards are units of one planted group.
int64_t pure_shards(const std::vector<int64_t>& order, const std::vector<int64_t>& group, int64_t G) {
  int64_t pure = 0;
  const size_t fe = order.size() / static_cast<size_t>(G);
  for (size_t g = 0; g < static_cast<size_t>(G); ++g) {
    bool same = true;
    for (size_t i = 0; i < fe; ++i) same = same && group[static_cast<size_t>(order[g * fe + i])] == group[static_cast<size_t>(order[g * fe])];
    pure += same;
  }
  return pure;
}

TEST(Clusters, FindWhatWasPlanted) {
  for (const auto& [f, G, h, noise] : {std::tuple<int64_t, int64_t, int64_t, double>{32, 4, 12, 0.2}, {96, 8, 100, 0.6}, {256, 16, 600, 1.0}, {64, 1, 20, 1.0}}) {
    const Planted model(f, G, h, noise);
    const auto order = cluster_units(of_one_layer(f, G, h), 0, model.reader());
    EXPECT_EQ(pure_shards(order, model.group, G), G) << f << ", " << G << ", " << h;
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    for (int64_t i = 0; i < f; ++i) ASSERT_EQ(sorted[static_cast<size_t>(i)], i);
  }
}

TEST(Clusters, ShardsAreWhereTheFirstOfTheirUnitsIs) {
  const Planted model(32, 4, 12, 0.1);
  const auto order = cluster_units(of_one_layer(32, 4, 12), 0, model.reader());
  for (size_t at = 0; at < 32; ++at) {
    if (at % 8 != 0) {
      EXPECT_LT(order[at - 1], order[at]);
    } else if (at > 0) {
      EXPECT_LT(order[at - 8], order[at]);
    }
  }
}

TEST(Clusters, WhatIsNotFiniteOrZeroIsNoReasonToFail) {
  Planted model(32, 4, 12, 0.2);
  model.tensors["model.layers.0.mlp.up_proj.weight"][3][4] = std::nan("");
  model.tensors["model.layers.0.mlp.gate_proj.weight"].fill_(0.0);
  auto order = cluster_units(of_one_layer(32, 4, 12), 0, model.reader());
  std::sort(order.begin(), order.end());
  for (int64_t i = 0; i < 32; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
}

}  // namespace
}  // namespace upcycle
