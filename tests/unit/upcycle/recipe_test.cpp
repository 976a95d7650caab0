#include "upcycle/recipe.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace upcycle {
namespace {

Architecture qwen3_14b() {
  Architecture a;
  a.hidden = 5120, a.layers = 40, a.heads = 40, a.kv_heads = 8, a.head_dim = 128, a.ffn = 17408, a.vocab = 151936;
  return a;
}

RunConfig run(int64_t experts, int64_t granularity, int64_t top_k, Scaling scaling = Scaling::exact) {
  RunConfig config;
  config.moe_given = true;
  config.moe.experts = experts, config.moe.granularity = granularity, config.moe.top_k = top_k;
  config.moe.max_parameters = 1e12;
  config.upcycle.scaling = scaling;
  return config;
}

void expect_refusal(const Architecture& dense, const RunConfig& config, const std::vector<std::string>& words) {
  try {
    make_recipe(dense, config);
    FAIL() << "nothing was said about " << words.front();
  } catch (const UserError& error) {
    const std::string said = error.what();
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << said << "\nlacks " << word;
  }
}

TEST(Recipe, ExactFactorsArePowersOfTwoOnUpAndDownOnly) {
  for (const auto& [G, up, down] : std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {2, 1, 2}, {4, 2, 2}, {8, 2, 4}, {16, 4, 4}, {32, 4, 8}}) {
    const Recipe recipe = make_recipe(qwen3_14b(), run(8 * G, G, 2 * G));
    EXPECT_EQ(recipe.gate_factor, 1.0) << G;
    EXPECT_EQ(recipe.up_factor, static_cast<double>(up)) << G;
    EXPECT_EQ(recipe.down_factor, static_cast<double>(down)) << G;
    EXPECT_EQ(recipe.copies, 8);
    EXPECT_EQ(recipe.exactness(), Exactness::exact);
    EXPECT_TRUE(recipe.lossless());
  }
}

TEST(Recipe, OtherGranularitiesAreExactButNotLossless) {
  Architecture a = qwen3_14b();
  a.ffn = 3072;
  const Recipe recipe = make_recipe(a, run(6, 3, 3));
  EXPECT_EQ(recipe.up_factor, 1.0);
  EXPECT_EQ(recipe.down_factor, 3.0);
  EXPECT_EQ(recipe.exactness(), Exactness::exact);
  EXPECT_FALSE(recipe.lossless());
}

TEST(Recipe, CubeRootIsMegatrons) {
  RunConfig config = run(64, 8, 8, Scaling::cube_root);
  Recipe recipe = make_recipe(qwen3_14b(), config);
  EXPECT_EQ(recipe.gate_factor, 2.0);
  EXPECT_EQ(recipe.up_factor, 2.0);
  EXPECT_EQ(recipe.down_factor, 2.0);
  EXPECT_EQ(recipe.exactness(), Exactness::approximate);
  config.moe.pre_softmax = true;  // (E * G^2 / K)^(1/3) = (8 * 64 / 8)^(1/3)
  recipe = make_recipe(qwen3_14b(), config);
  EXPECT_DOUBLE_EQ(recipe.gate_factor, 4.0);
  EXPECT_FALSE(recipe.moe.renormalise);
  config = run(4, 1, 2, Scaling::cube_root);
  EXPECT_EQ(make_recipe(qwen3_14b(), config).exactness(), Exactness::exact);
  config.moe.pre_softmax = true;
  EXPECT_DOUBLE_EQ(make_recipe(qwen3_14b(), config).up_factor, std::cbrt(2.0));
  EXPECT_EQ(make_recipe(qwen3_14b(), config).exactness(), Exactness::approximate);
}

TEST(Recipe, SaysHowFarFromExactItIs) {
  const auto exactness = [](auto change) {
    RunConfig config = run(8, 2, 4, Scaling::none);
    change(config);
    return make_recipe(qwen3_14b(), config).exactness();
  };
  EXPECT_EQ(exactness([](RunConfig&) {}), Exactness::destructive) << "no scaling, shards of a half";
  EXPECT_EQ(exactness([](RunConfig& c) { c.moe.granularity = 1; }), Exactness::exact);
  EXPECT_EQ(exactness([](RunConfig& c) { c.moe.granularity = 1, c.moe.pre_softmax = true; }), Exactness::approximate);
  EXPECT_EQ(exactness([](RunConfig& c) { c.upcycle.scaling = Scaling::exact; }), Exactness::exact);
  EXPECT_EQ(exactness([](RunConfig& c) { c.upcycle.scaling = Scaling::exact, c.upcycle.noise = 0.01; }), Exactness::approximate);
  EXPECT_EQ(exactness([](RunConfig& c) { c.upcycle.scaling = Scaling::exact, c.upcycle.drop = 0.5; }), Exactness::destructive);
  EXPECT_EQ(exactness([](RunConfig& c) { c.upcycle.scaling = Scaling::cube_root; }), Exactness::approximate);
  EXPECT_EQ(exactness([](RunConfig& c) { c.upcycle.scaling = Scaling::cube_root, c.moe.top_k = 3; }), Exactness::destructive);
}

TEST(Recipe, RefusesWhatCannotBe) {
  const Architecture a = qwen3_14b();
  expect_refusal(a, run(64, 8, 12), {"top_k", "granularity", "12 % 8 = 4", "top_k = 16"});
  expect_refusal(a, run(70, 8, 8), {"moe.experts = 70", "granularity = 8", "64 or 72"});
  expect_refusal(a, run(6, 3, 3), {"intermediate_size = 17408", "granularity = 3"});
  expect_refusal(a, run(4, 1, 5), {"top_k = 5", "experts = 4"});
  expect_refusal(a, run(4, 1, 0), {"top_k = 0"});
  expect_refusal(a, run(0, 1, 1), {"moe.experts = 0"});
  expect_refusal(a, run(4, 0, 1), {"moe.granularity = 0"});
  RunConfig config = run(8, 1, 2);
  config.moe.pre_softmax = true;
  expect_refusal(a, config, {"pre_softmax", "exact", "top 2 of 8"});
  Architecture moe = a;
  moe.experts = 16;
  expect_refusal(moe, run(64, 8, 8), {"mixture of 16 experts"});
}

TEST(Recipe, RefusesMoreParametersThanAllowed) {
  RunConfig config = run(64, 1, 8);
  config.moe.max_parameters = 140e9;
  expect_refusal(qwen3_14b(), config, {"would have 688.6e9 parameters", "more than moe.max_parameters = 140e9", "64 copies"});
  config.moe.granularity = 8;
  EXPECT_NO_THROW(make_recipe(qwen3_14b(), config));
}

Architecture layers(const std::string& policy) {
  Architecture a = qwen3_14b();
  a.layers = 6;
  MoeSection moe = run(8, 1, 2).moe;
  moe.layers_text = policy;
  return moe_architecture(a, moe);
}

std::string moe_layers(const Architecture& a) {
  std::string out;
  for (int64_t layer = 0; layer < a.layers; ++layer) out += a.is_moe_layer(layer) ? 'M' : '.';
  return out;
}

TEST(Recipe, LayerPolicies) {
  EXPECT_EQ(moe_layers(layers("all")), "MMMMMM");
  EXPECT_EQ(moe_layers(layers("every:2")), ".M.M.M");
  EXPECT_EQ(layers("every:2").sparse_step, 2);
  EXPECT_TRUE(layers("every:2").dense_layers.empty());
  EXPECT_EQ(moe_layers(layers("first-dense:2")), "..MMMM");
  EXPECT_EQ(layers("first-dense:2").dense_layers, (std::set<int64_t>{0, 1}));
  EXPECT_EQ(moe_layers(layers("first-dense:0")), "MMMMMM");
  EXPECT_EQ(moe_layers(layers("[0, 3, 5]")), "M..M.M");
  EXPECT_EQ(moe_layers(layers("[2]")), "..M...");
}

TEST(Recipe, RefusesLayerPoliciesThatSayNothing) {
  const auto refuse = [](const std::string& policy, const std::string& why) {
    try {
      layers(policy);
      FAIL() << policy;
    } catch (const UserError& error) {
      EXPECT_NE(std::string(error.what()).find("moe.layers = \"" + policy + "\""), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
  };
  refuse("some", "not understood");
  refuse("every:", "'' is not");
  refuse("every:0", "at least 1");
  refuse("every:7", "none of the 6 layers");
  refuse("first-dense:6", "none of the 6 layers");
  refuse("first-dense:-1", "'-1' is not");
  refuse("[]", "none of the 6 layers");
  refuse("[1, two]", "'two' is not");
  refuse("[1, 6]", "no layer 6");
  refuse("[1, 1]", "twice");
  refuse("[1,]", "'' is not");
}

TEST(Recipe, JsonHasWhatProvenanceNeeds) {
  const nlohmann::json json = to_json(make_recipe(qwen3_14b(), run(64, 8, 8)));
  EXPECT_EQ(json["experts"], 64);
  EXPECT_EQ(json["copies"], 8);
  EXPECT_EQ(json["factors"]["down"], 4.0);
  EXPECT_EQ(json["exactness"], "exact");
  EXPECT_EQ(json["lossless"], true);
  EXPECT_EQ(json["scaling"], "exact");
  EXPECT_EQ(json["seed"], 1234);
}

}  // namespace
}  // namespace upcycle
