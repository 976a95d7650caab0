// A mixture merged back into a dense model. C copies, G shards
#include "upcycle/merge.hpp"

#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "unit/upcycle/model.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

/// The whole mixture in memory, in `dtype`.
struct Mixture {
  Mixture(const Recipe& recipe, Dense& dense, at::ScalarType dtype) {
    for (const ParameterSpec& spec : catalogue(recipe.moe)) tensors[spec.name] = grown(spec, recipe, dense).to(dtype);
  }
  ReadDense reader() const {
    return [this](const std::string& name, const Box& box) { return slice(tensors.at(name), box); };
  }
  std::map<std::string, Tensor> tensors;
};

TEST(Merge, WhatWasJustGrownIsTheDenseModelBitForBit) {
  for (const auto dtype : {at::kBFloat16, at::kFloat}) {
    Dense dense(dense_architecture(dtype));
    for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
      for (const auto& [N, G, K] : {std::array<int64_t, 3>{3, 1, 2}, {6, 2, 2}, {12, 4, 8}, {56, 8, 8}, {1, 1, 1}}) {
        RunConfig config = run(N, G, K);
        config.upcycle.permutation = order;
        config.moe.layers_text = "first-dense:1";
        const Recipe recipe = recipe_of(config, dense, dense_architecture(dtype));
        const Mixture mixture(recipe, dense, dtype);
        int64_t tensors = 0;
        for (const ParameterSpec& spec : catalogue(recipe.source)) {
          EXPECT_TRUE(at::equal(merged(spec, whole(spec.shape), recipe, mixture.reader()).to(at::kFloat), dense.tensors.at(spec.name).to(at::kFloat))) << spec.name << N << G;
          ++tensors;
        }
        EXPECT_EQ(tensors, 3 * 11 + 2);
      }
    }
  }
}

TEST(Merge, AnyBoxIsThatPartOfTheWhole) {
  Dense dense(dense_architecture(at::kFloat));
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    RunConfig config = run(12, 4, 4);
    config.upcycle.permutation = order;
    config.upcycle.noise = 0.1;   // copies that differ
    const Recipe recipe = recipe_of(config, dense, dense_architecture(at::kFloat));
    const Mixture mixture(recipe, dense, at::kFloat);
    for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
      const std::vector<ParameterSpec> specs = catalogue(recipe.source);
      const ParameterSpec spec = find(specs, text("model.layers.1.mlp.", name, ".weight"));
      const Tensor all = merged(spec, whole(spec.shape), recipe, mixture.reader());
      for (const Box& box : {Box{{3, 0}, {1, spec.shape[1]}}, Box{{5, 2}, {6, 7}}, Box{{0, 1}, {spec.shape[0], 3}}, Box{{4, 4}, {0, 2}}}) {
        EXPECT_TRUE(at::equal(merged(spec, box, recipe, mixture.reader()), slice(all, box))) << name << describe(box);
      }
    }
  }
}

TEST(Merge, OtherFactorsLeaveRounding) {
  Dense dense(dense_architecture(at::kFloat));
  RunConfig config = run(8, 4, 4);
  config.upcycle.scaling = Scaling::cube_root;
  config.upcycle.permutation = UnitOrder::random;
  const Recipe recipe = recipe_of(config, dense, dense_architecture(at::kFloat));
  ASSERT_FALSE(recipe.lossless());
  const Mixture mixture(recipe, dense, at::kFloat);
  for (const ParameterSpec& spec : catalogue(recipe.source)) {
    const Tensor expected = dense.tensors.at(spec.name);
    EXPECT_TRUE(merged(spec, whole(spec.shape), recipe, mixture.reader()).sub(expected).abs().le(expected.abs() * 1.2e-7).all().item<bool>()) << spec.name;
  }
}

TEST(Merge, CopiesThatDifferAreAveraged) {
  Dense dense(dense_architecture(at::kFloat));
  RunConfig config = run(12, 4, 4);
  config.upcycle.permutation = UnitOrder::random;
  const Recipe recipe = recipe_of(config, dense, dense_architecture(at::kFloat));
  Mixture mixture(recipe, dense, at::kFloat);
  const std::string name = "model.layers.2.mlp.up_proj.weight";
  const Tensor experts = mixture.tensors.at("model.layers.2.mlp.experts.up_proj.weight");
  experts[6][3][5] += 0.75;   // shard 2 of copy 1, its unit 3; the factor of up is 2
  const int64_t unit = units_of_expert(recipe, 2, 6)[3];
  Tensor expected = dense.tensors.at(name).to(at::kDouble);
  expected[unit][5] += 0.75 / 2 / 3;
  const ParameterSpec spec = find(catalogue(recipe.source), name);
  const Tensor found = merged(spec, whole(spec.shape), recipe, mixture.reader());
  EXPECT_LT((found.to(at::kDouble) - expected).abs().max().item<double>(), 1e-7);
  EXPECT_EQ(found.ne(dense.tensors.at(name)).sum().item<int64_t>(), 1);
}

TEST(RecipeJson, ComesBackWhole) {
  Dense dense(dense_architecture());
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    RunConfig config = run(8, 4, 5);
    config.upcycle.permutation = order;
    config.upcycle.scaling = Scaling::cube_root;
    config.upcycle.noise = 0.25, config.upcycle.drop = 0.5, config.upcycle.router_logit_std = 0.7;
    config.upcycle.drop_indices = DropIndices::per_matrix;
    config.moe.layers_text = "every:2";
    config.moe.pre_softmax = true;
    const Recipe recipe = recipe_of(config, dense);
    const Recipe back = recipe_from_json(nlohmann::json::parse(to_json(recipe).dump()), recipe.moe, order == UnitOrder::clusters ? clusters_to_text(recipe) : "");
    EXPECT_EQ(to_json(back), to_json(recipe));
    EXPECT_EQ(back.source, recipe.source);
    EXPECT_EQ(back.clusters, recipe.clusters);
    for (const ParameterSpec& spec : catalogue(recipe.moe)) EXPECT_TRUE(at::equal(grown(spec, back, dense), grown(spec, recipe, dense))) << spec.name;
  }
}

TEST(RecipeJson, WhatIsMissingIsNamed) {
  Dense dense(dense_architecture());
  RunConfig config = run(8, 4, 4);
  config.upcycle.permutation = UnitOrder::clusters;
  const Recipe recipe = recipe_of(config, dense);
  const auto refusal = [&](const nlohmann::json& json, const Architecture& moe, const std::string& clusters) -> std::string {
    try {
      recipe_from_json(json, moe, clusters);
    } catch (const UserError& error) {
      return error.what();
    }
    return "nothing";
  };
  EXPECT_NE(refusal(to_json(recipe), recipe.moe, "").find("clusters.json"), std::string::npos);
  EXPECT_NE(refusal(to_json(recipe), recipe.moe, "{\"0\": [1, 2]}").find("clusters.json"), std::string::npos);
  EXPECT_NE(refusal(to_json(recipe), recipe.moe, "not json").find("clusters.json"), std::string::npos);
  nlohmann::json damaged = to_json(recipe);
  damaged.erase("copies");
  EXPECT_NE(refusal(damaged, recipe.moe, clusters_to_text(recipe)).find("copies"), std::string::npos);
  Architecture other = recipe.moe;
  other.experts = 16;
  EXPECT_NE(refusal(to_json(recipe), other, clusters_to_text(recipe)).find("16 experts"), std::string::npos);
}

}  // namespace
}  // namespace upcycle
