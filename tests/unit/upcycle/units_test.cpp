// The order in which copies take hidden units. f units, G shards of a copy, C copies
#include "upcycle/units.hpp"

#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "unit/upcycle/model.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

const std::string kExperts = "model.layers.1.mlp.experts.", kDense = "model.layers.1.mlp.";

RunConfig ordered(int64_t experts, int64_t granularity, int64_t top_k, UnitOrder order) {
  RunConfig config = run(experts, granularity, top_k);
  config.upcycle.permutation = order;
  return config;
}

bool each_once(std::vector<int64_t> order, int64_t f) {
  std::sort(order.begin(), order.end());
  for (int64_t i = 0; i < f; ++i) {
    if (order.at(static_cast<size_t>(i)) != i) return false;
  }
  return static_cast<int64_t>(order.size()) == f;
}

TEST(Units, EveryCopyOfARandomOrderHasItsOwn) {
  Dense dense(dense_architecture());
  const Recipe recipe = recipe_of(ordered(16, 4, 4, UnitOrder::random), dense);
  std::set<std::vector<int64_t>> seen;
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t copy = 0; copy < 4; ++copy) {
      const auto order = unit_order(recipe, layer, copy);
      EXPECT_TRUE(each_once(order, 32));
      EXPECT_TRUE(seen.insert(order).second) << layer << ", " << copy;
      std::vector<int64_t> shards;
      for (int64_t g = 0; g < 4; ++g) {
        const auto units = units_of_expert(recipe, layer, copy * 4 + g);
        shards.insert(shards.end(), units.begin(), units.end());
      }
      EXPECT_EQ(shards, order);
    }
  }
  Recipe other = recipe;
  other.seed += 1;
  EXPECT_NE(unit_order(other, 0, 0), unit_order(recipe, 0, 0));
}

TEST(Units, AnExpertIsItsUnitsOfTheDenseFeedForward) {
  Dense dense(dense_architecture());
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    const Recipe recipe = recipe_of(ordered(16, 8, 8, order), dense);
    const auto specs = catalogue(recipe.moe);
    for (int64_t e = 0; e < 16; ++e) {
      const Tensor units = at::tensor(units_of_expert(recipe, 1, e), at::kLong);
      for (const auto& [matrix, dim, factor] : {std::tuple{"gate_proj", 0, 1.0}, {"up_proj", 0, 2.0}, {"down_proj", 1, 4.0}}) {
        const Tensor expected = dense.tensors.at(kDense + matrix + ".weight").to(at::kFloat).index_select(dim, units) * factor;
        EXPECT_TRUE(at::equal(grown(find(specs, kExperts + matrix + ".weight"), recipe, dense)[e], expected)) << matrix << e;
      }
    }
  }
}

TEST(Units, OnlyTheRowsThatAreNeededAreRead) {
  Dense dense(dense_architecture());
  const Recipe recipe = recipe_of(ordered(8, 4, 4, UnitOrder::random), dense);
  const auto specs = catalogue(recipe.moe);
  dense.reads.clear();
  grown(find(specs, kExperts + "up_proj.weight"), {{5, 2, 3}, {1, 4, 6}}, recipe, dense);
  const auto units = units_of_expert(recipe, 1, 5);
  std::vector<int64_t> rows;
  for (const auto& [name, box] : dense.reads) {
    EXPECT_EQ(name, kDense + "up_proj.weight");
    EXPECT_EQ((std::pair{box.begin[1], box.size[1]}), (std::pair<int64_t, int64_t>{3, 6}));
    for (int64_t row = 0; row < box.size[0]; ++row) rows.push_back(box.begin[0] + row);
  }
  EXPECT_EQ(rows, std::vector<int64_t>(units.begin() + 2, units.begin() + 6));
  dense.reads.clear();
  grown(find(specs, kExperts + "down_proj.weight"), {{5, 7, 2}, {1, 3, 4}}, recipe, dense);
  ASSERT_EQ(dense.reads.size(), 1u) << "scattered columns: their rows, once";
  EXPECT_EQ((std::pair{dense.reads[0].second.begin[0], dense.reads[0].second.size[0]}), (std::pair<int64_t, int64_t>{7, 3}));
}

TEST(Units, TheDenseSliceIsTheExpertBeforeNoiseAndDrop) {
  Dense dense(dense_architecture());
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    RunConfig config = ordered(8, 4, 4, order);
    const Recipe plain = recipe_of(config, dense);
    config.upcycle.noise = 0.1, config.upcycle.drop = 0.5;
    const Recipe disturbed = recipe_of(config, dense);
    for (const ParameterSpec& spec : catalogue(plain.moe)) {
      if (spec.role == Role::router) {
        EXPECT_THROW(dense_slice(spec, whole(spec.shape), plain, dense.reader()), std::logic_error);
        continue;
      }
      Box box = whole(spec.shape);
      box.begin.back() += 1, box.size.back() -= 2;
      EXPECT_TRUE(at::equal(dense_slice(spec, box, disturbed, dense.reader()), grown(spec, box, plain, dense))) << spec.name;
      const bool differs = !at::equal(dense_slice(spec, box, disturbed, dense.reader()), grown(spec, box, disturbed, dense));
      EXPECT_EQ(differs, spec.role == Role::expert);
    }
  }
}

TEST(Units, ClustersThatAreNotKnownAreAFault) {
  EXPECT_THROW(unit_order(make_recipe(dense_architecture(), ordered(8, 4, 4, UnitOrder::clusters)), 0, 0), std::logic_error);
}

}  // namespace
}  // namespace upcycle
