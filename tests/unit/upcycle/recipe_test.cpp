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
}

Architecture mixture_of_16(bool renormalise = true) {
  Architecture moe = qwen3_14b();
  moe.experts = 16, moe.top_k = 3, moe.expert_ffn = 1000, moe.renormalise = renormalise, moe.dense_layers = {0, 7};
  return moe;
}

TEST(Recipe, AMixtureGrowsByCopies) {
  const Recipe recipe = make_recipe(mixture_of_16(), run(48, 1, 9));
  EXPECT_TRUE(recipe.of_mixture());
  EXPECT_EQ(recipe.copies, 3);
  EXPECT_EQ(recipe.tied(), 3);
  EXPECT_EQ(recipe.moe.expert_ffn, 1000);
  EXPECT_EQ(recipe.moe.dense_layers, mixture_of_16().dense_layers);
  EXPECT_EQ(recipe.exactness(), Exactness::exact);
  EXPECT_TRUE(recipe.lossless());
  RunConfig other = run(48, 1, 3, Scaling::none);
  EXPECT_EQ(make_recipe(mixture_of_16(), other).exactness(), Exactness::approximate);
  other = run(48, 1, 9), other.upcycle.noise = 0.1;
  EXPECT_EQ(make_recipe(mixture_of_16(), other).exactness(), Exactness::approximate);
  other.upcycle.drop = 0.1;
  EXPECT_EQ(make_recipe(mixture_of_16(), other).exactness(), Exactness::destructive);
  other = run(32, 1, 6), other.moe.pre_softmax = true;
  EXPECT_EQ(make_recipe(mixture_of_16(false), other).exactness(), Exactness::exact) << "1/C of the probability, C times";
}

TEST(Recipe, RefusesWhatAMixtureCannotBe) {
  expect_refusal(mixture_of_16(), run(64, 8, 8), {"mixture of 16 experts", "moe.granularity = 8"});
  expect_refusal(mixture_of_16(), run(40, 1, 6), {"moe.experts = 40", "mixture of 16 experts", "32 or 48"});
  expect_refusal(mixture_of_16(), run(8, 1, 2), {"moe.experts = 8", "take 32"});
  expect_refusal(mixture_of_16(), run(48, 1, 3), {"needs moe.top_k = 9", "3 of its 16", "3 times", "\"none\""});
  expect_refusal(mixture_of_16(), run(48, 1, 49), {"top_k = 49"});
  expect_refusal(mixture_of_16(), run(48, 1, 9, Scaling::cube_root), {"cube-root", "mixture"});
  expect_refusal(mixture_of_16(false), run(48, 1, 9), {"pre_softmax = false", "not renormalised"});
  RunConfig config = run(48, 1, 9);
  config.upcycle.permutation = UnitOrder::random;
  expect_refusal(mixture_of_16(), config, {"upcycle.permutation", "copied whole"});
  config = run(48, 1, 9), config.moe.layers_text = "every:2";
  expect_refusal(mixture_of_16(), config, {"moe.layers", "leave the key out"});
}

TEST(Recipe, QuotasOfSeveralSources) {
  RunConfig config = run(32, 4, 4);
  config.source.models = {"a", "b", "c"};
  Recipe recipe = make_recipe(qwen3_14b(), config);
  EXPECT_EQ(recipe.quotas, (std::vector<int64_t>{2, 3, 3})) << "spread evenly";
  EXPECT_EQ(recipe.exactness(), Exactness::approximate);
  config.source.quotas = {5, 1, 2};
  recipe = make_recipe(qwen3_14b(), config);
  std::vector<int64_t> of;
  for (int64_t copy = 0; copy < 8; ++copy) of.push_back(recipe.source_of(copy));
  EXPECT_EQ(of, (std::vector<int64_t>{0, 0, 0, 0, 0, 1, 2, 2}));
  config.source.models = {"a", "a", "a"};
  EXPECT_EQ(make_recipe(qwen3_14b(), config).exactness(), Exactness::exact) << "the same model thrice";
  config.source.quotas = {5, 1, 3};
  expect_refusal(qwen3_14b(), config, {"source.quotas add up to 9", "8 copies"});
  config = run(8, 4, 4);
  config.source.models = {"a", "b", "c"};
  expect_refusal(qwen3_14b(), config, {"3 models", "2 copies"});
  config = run(32, 1, 6), config.source.models = {"a", "b"};
  expect_refusal(mixture_of_16(), config, {"source.models", "mixtures of 16"});
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
