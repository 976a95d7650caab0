#include "upcycle/certificate.hpp"

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "unit/upcycle/model.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

const std::string kUp = "model.layers.1.mlp.experts.up_proj.weight", kRouter = "model.layers.1.mlp.gate.weight";

/// The whole mixture in memory, to be damaged.
std::map<std::string, Tensor> mixture(const Recipe& recipe, Dense& dense) {
  std::map<std::string, Tensor> out;
  for (const ParameterSpec& spec : catalogue(recipe.moe)) out[spec.name] = grown(spec, recipe, dense);
  return out;
}

/// The certificate of `values`, checked in boxes: each parameter in `parts` parts of dim 0.
Certificate judge(const Recipe& recipe, const std::map<std::string, Tensor>& values, Dense& dense, int64_t parts = 1) {
  Certificate out(recipe);
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    const auto value = values.find(spec.name);
    if (value == values.end()) continue;
    const int64_t cuts = spec.role == Role::router ? 1 : parts;   // a router is never cut
    for (int64_t part = 0; part < cuts; ++part) {
      Box box = whole(spec.shape);
      box.begin[0] = part * spec.shape[0] / cuts;
      box.size[0] = (part + 1) * spec.shape[0] / cuts - box.begin[0];
      out.weights.check(spec, box, slice(value->second, box), recipe, dense.reader());
    }
  }
  return out;
}

void expect_objection(const Certificate& certificate, const std::vector<std::string>& words) {
  std::string said;
  for (const std::string& line : certificate.objections()) said += line + "\n";
  EXPECT_FALSE(certificate.passed());
  for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << said << "lacks " << word;
  EXPECT_NE(certificate.table().find("FAILED"), std::string::npos);
  EXPECT_EQ(certificate.to_json()["verdict"], "failed");
}

Recipe granular() { return make_recipe(dense_architecture(), run(16, 8, 8)); }

TEST(WeightLevel, WhatGrewPassesInAnyParts) {
  Dense dense(dense_architecture());
  RunConfig drop = run(8, 2, 2), noise = run(4, 1, 2), cube = run(8, 4, 4), mixed = run(4, 2, 2), none = run(4, 2, 2);
  drop.upcycle.drop = 0.4;
  noise.upcycle.noise = 0.01;
  cube.upcycle.scaling = Scaling::cube_root;
  mixed.moe.layers_text = "every:2";
  none.upcycle.scaling = Scaling::none;
  RunConfig random = drop, clusters = mixed, random_copies = run(4, 1, 1);
  random.upcycle.permutation = random_copies.upcycle.permutation = UnitOrder::random;
  clusters.upcycle.permutation = UnitOrder::clusters;
  for (const RunConfig& config : {run(16, 8, 8), run(4, 1, 1), drop, noise, cube, mixed, none, random, random_copies, clusters}) {
    const Recipe recipe = recipe_of(config, dense);
    const auto values = mixture(recipe, dense);
    for (const int64_t parts : {1, 2, 4}) {
      const Certificate certificate = judge(recipe, values, dense, parts);
      EXPECT_EQ(certificate.objections(), std::vector<std::string>{});
      EXPECT_EQ(certificate.to_json()["weights"]["values"], count_parameters(recipe.moe).total);
      EXPECT_EQ(certificate.weights.altered > 0, recipe.drop > 0 || recipe.noise > 0);
    }
  }
}

TEST(WeightLevel, StoredInTheSourcesDtypeIsStillExact) {
  Dense dense(dense_architecture());
  auto values = mixture(granular(), dense);
  for (auto& [name, value] : values) value = value.to(at::kBFloat16);
  EXPECT_TRUE(judge(granular(), values, dense).passed());
}

TEST(WeightLevel, OneBitIsEnough) {
  Dense dense(dense_architecture());
  for (const std::string& name : {kUp, std::string("model.layers.2.mlp.experts.down_proj.weight"), std::string("model.norm.weight"),
                                  std::string("model.layers.0.self_attn.q_proj.weight")}) {
    auto values = mixture(granular(), dense);
    const Tensor flat = values[name].reshape({-1});
    float& x = flat.data_ptr<float>()[11];
    x = std::nextafter(x, 1e9f);
    const Certificate certificate = judge(granular(), values, dense);
    EXPECT_EQ(certificate.weights.mismatches, 1);
    expect_objection(certificate, {"1 of", name + "["});
  }
}

TEST(WeightLevel, NamesThePlaceOfTheFirst) {
  Dense dense(dense_architecture());
  auto values = mixture(granular(), dense);
  values[kUp][13][2][7] = 123.0;
  expect_objection(judge(granular(), values, dense, 4), {kUp + "[13, 2, 7] is 123"});
}

TEST(WeightLevel, LostExpertsAreMissed) {
  Dense dense(dense_architecture());
  const Recipe recipe = granular();
  const auto values = mixture(recipe, dense);
  Certificate certificate(recipe);
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    Box box = whole(spec.shape);
    if (spec.name == kUp) box.size[0] = 15;
    certificate.weights.check(spec, box, slice(values.at(spec.name), box), recipe, dense.reader());
  }
  expect_objection(certificate, {kUp + ": 720 of 768 values are there"});
  Certificate overlapping(recipe);
  const ParameterSpec up = find(catalogue(recipe.moe), kUp);
  for (const int64_t begin : {0, 7}) {
    const Box box{{begin, 0, 0}, {9, 4, 12}};
    overlapping.weights.check(up, box, slice(values.at(kUp), box), recipe, dense.reader());
  }
  expect_objection(overlapping, {kUp + ": parts overlap"});
  expect_objection(Certificate(recipe), {"model.norm.weight: 0 of 12 values are there"});
}

TEST(WeightLevel, ExpertsInShardMajorOrderAreWrong) {
  Dense dense(dense_architecture());
  auto values = mixture(granular(), dense);
  Tensor& up = values[kUp];
  up = up.reshape({2, 8, 4, 12}).transpose(0, 1).reshape({16, 4, 12}).contiguous();   // expert g*C + c
  expect_objection(judge(granular(), values, dense), {kUp});
}

TEST(WeightLevel, RoutersMustBeTiedInsideCopiesAndOnlyThere) {
  Dense dense(dense_architecture());
  auto values = mixture(granular(), dense);
  values[kRouter][5][3] += 0.25;
  expect_objection(judge(granular(), values, dense), {kRouter + "[5, 3]"});

  values = mixture(granular(), dense);
  values[kRouter] = values[kRouter].reshape({2, 8, 12}).transpose(0, 1).reshape({16, 12}).contiguous();   // tied by shard: a public bug
  expect_objection(judge(granular(), values, dense), {kRouter});

  values = mixture(granular(), dense);
  values[kRouter].narrow(0, 8, 8).copy_(values[kRouter].narrow(0, 0, 8));
  expect_objection(judge(granular(), values, dense), {"copies 0 and 1 have the same router row"});

  values = mixture(granular(), dense);
  values[kRouter].narrow(0, 0, 8).fill_(std::numeric_limits<double>::quiet_NaN());
  expect_objection(judge(granular(), values, dense), {"not finite"});
}

TEST(WeightLevel, AnotherOrderOfHiddenUnitsIsWrong) {
  Dense dense(dense_architecture());
  std::map<UnitOrder, Recipe> recipes;
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    RunConfig config = run(8, 4, 4);
    config.upcycle.permutation = order;
    recipes[order] = recipe_of(config, dense);
  }
  for (const auto& [order, recipe] : recipes) {
    for (const auto& [other, promised] : recipes) {
      const Certificate certificate = judge(promised, mixture(recipe, dense), dense);
      EXPECT_EQ(certificate.passed(), order == other) << static_cast<int>(order) << static_cast<int>(other);
    }
  }
  // The function is blind to a swap of two units; a shard that has one of another's is not, and neither is this.
  auto values = mixture(recipes[UnitOrder::clusters], dense);
  for (const char* matrix : {"gate_proj", "up_proj"}) {
    Tensor& x = values["model.layers.1.mlp.experts." + std::string(matrix) + ".weight"];
    const Tensor first = x[3][0].clone();
    x[3][0] = x[3][1], x[3][1] = first;
  }
  expect_objection(judge(recipes[UnitOrder::clusters], values, dense), {"model.layers.1.mlp.experts.gate_proj.weight[3, 0, 0]"});
}

TEST(WeightLevel, AnOrderMustTakeEachUnitOnce) {
  Dense dense(dense_architecture());
  RunConfig config = run(8, 4, 4);
  config.upcycle.permutation = UnitOrder::clusters;
  Recipe recipe = recipe_of(config, dense);
  recipe.clusters[1][4] = recipe.clusters[1][20];   // and grow() does just what it is told
  expect_objection(judge(recipe, mixture(recipe, dense), dense), {kUp.substr(0, 14), "the order of copy 0's hidden units takes unit", "not once"});
  recipe.clusters[1].pop_back();
  recipe.clusters[1][4] = recipe_of(config, dense).clusters[1][4];
  EXPECT_FALSE(judge(recipe, mixture(recipe_of(config, dense), dense), dense).passed());
}

TEST(WeightLevel, DropMayChangeOnlySoMany) {
  Dense dense(dense_architecture());
  RunConfig config = run(8, 2, 2);
  config.upcycle.drop = 0.25;
  const Recipe recipe = make_recipe(dense_architecture(), config);
  auto values = mixture(recipe, dense);
  EXPECT_TRUE(judge(recipe, values, dense).passed());
  values[kUp][3] = 0.0;
  expect_objection(judge(recipe, values, dense), {"144 of", kUp + "[3, 0, 0]"});   // 16 units x 12, of which 4 may differ
}

TEST(Certificate, EvidenceOfRanksMerges) {
  Dense dense(dense_architecture());
  const Recipe recipe = granular();
  auto values = mixture(recipe, dense);
  values[kUp][9][0][0] = 7.0;
  Certificate ranks[2] = {Certificate(recipe), Certificate(recipe)};
  for (int64_t rank = 0; rank < 2; ++rank) {
    for (const ParameterSpec& spec : catalogue(recipe.moe)) {
      Box box = whole(spec.shape);
      if (spec.role == Role::expert) box.begin[0] = rank * 8, box.size[0] = 8;   // the rest is replicated
      ranks[rank].weights.check(spec, box, slice(values.at(spec.name), box), recipe, dense.reader());
    }
    FunctionLevel f;
    f.precision = "float32";
    const Tensor logits = at::tensor({1.0, 2.0, 3.0}).reshape({1, 3});
    f.add_logits(logits, logits + 1.0 * rank, at::tensor({0}, at::kLong));
    f.layers[1].add(logits, logits * (1.0 + rank));
    f.layers[2].max_abs = std::numeric_limits<double>::quiet_NaN();
    f.routing = {10, 1, 2, 9 + rank};
    ranks[rank].functions.push_back(f);
  }
  ranks[0].merge(ranks[1].pack());
  const nlohmann::json json = ranks[0].to_json();
  EXPECT_EQ(json["weights"]["values"], count_parameters(recipe.moe).total);
  EXPECT_EQ(json["weights"]["mismatches"], 1);
  EXPECT_NE(json["weights"]["first_mismatch"].get<std::string>().find(kUp + "[9, 0, 0]"), std::string::npos);
  EXPECT_EQ(json["functions"][0]["tokens"], 2);
  EXPECT_DOUBLE_EQ(json["functions"][0]["logits"]["relative_l2"], std::sqrt(3.0 / 28.0));
  EXPECT_DOUBLE_EQ(json["functions"][0]["routing"]["complete_copies"], 0.95);
  EXPECT_TRUE(json["functions"][0]["feed_forwards"][1]["max_abs"].is_null()) << "NaN survives the journey";
  EXPECT_DOUBLE_EQ(ranks[0].functions[0].layers[1].relative_l2(), std::sqrt(0.5));
  Certificate other(recipe);
  EXPECT_THROW(other.merge(ranks[1].pack()), std::logic_error);
}

Certificate with_function(const Recipe& recipe, Dense& dense, const Tensor& reference, const Tensor& other, const char* precision = "float32") {
  Certificate certificate = judge(recipe, mixture(recipe, dense), dense);
  FunctionLevel f;
  f.precision = precision;
  f.add_logits(reference, other, at::tensor({1, 0}, at::kLong));
  f.layers[0].add(reference, other);
  certificate.functions.push_back(f);
  return certificate;
}

TEST(FunctionLevel, ExactMeansOneInAHundredThousand) {
  Dense dense(dense_architecture());
  const Tensor logits = at::tensor({1.0, -2.0, 3.0, 0.5}, at::kDouble).reshape({2, 2});
  EXPECT_TRUE(with_function(granular(), dense, logits, logits * (1 + 0.9e-5)).passed());
  const Certificate off = with_function(granular(), dense, logits, logits * (1 + 1.2e-5));
  expect_objection(off, {"logits differ by 1.20e-05", "feed-forwards differ by 1.20e-05", "at most 1.00e-05"});
  EXPECT_TRUE(with_function(granular(), dense, logits, logits * 1.01, "bfloat16").passed()) << "only fp32 decides";
  expect_objection(with_function(granular(), dense, logits, logits * std::nan("")), {"not finite"});
}

TEST(FunctionLevel, ApproximateRecipesTellByHowMuchTheyMiss) {
  Dense dense(dense_architecture());
  RunConfig config = run(16, 8, 8);
  config.upcycle.scaling = Scaling::cube_root;
  const Tensor logits = at::tensor({1.0, -2.0, 3.0, 0.5}, at::kDouble).reshape({2, 2});
  const Certificate certificate = with_function(make_recipe(dense_architecture(), config), dense, logits, logits * 1.25);
  EXPECT_TRUE(certificate.passed());
  EXPECT_NE(certificate.table().find("misses the dense function by 25.0 % of the logits"), std::string::npos) << certificate.table();
  EXPECT_EQ(certificate.to_json()["expected"], "approximate");
}

TEST(FunctionLevel, NumbersByHand) {
  FunctionLevel f;
  const Tensor dense = at::tensor({0.0, std::log(3.0)}, at::kDouble).reshape({1, 2});   // probabilities 1/4, 3/4
  const Tensor moe = at::tensor({0.0, 0.0}, at::kDouble).reshape({1, 2});               // 1/2, 1/2
  f.add_logits(dense, moe, at::tensor({0}, at::kLong));
  EXPECT_DOUBLE_EQ(f.dense_loss, std::log(4.0));
  EXPECT_DOUBLE_EQ(f.moe_loss, std::log(2.0));
  EXPECT_DOUBLE_EQ(f.divergence, 0.25 * std::log(0.5) + 0.75 * std::log(1.5));
  EXPECT_DOUBLE_EQ(f.logits.relative_l2(), 1.0);
  EXPECT_DOUBLE_EQ(f.logits.max_abs, std::log(3.0));
  EXPECT_EQ(f.tokens, 1);
}

TEST(RoutingCount, CompleteCopiesAndTies) {
  // Three copies of two shards, top-2: rows are tokens.
  const auto count = [](std::vector<double> copies, std::vector<int64_t> experts) {
    const Tensor logits = at::tensor(copies, at::kFloat).reshape({1, 3, 1}).expand({1, 3, 2}).reshape({1, 6});
    RoutingCount out;
    out.add(logits, at::tensor(experts, at::kLong).reshape({1, 2}), 2);
    return out;
  };
  const RoutingCount clear = count({1.0, 2.0, 0.0}, {3, 2});
  EXPECT_EQ(clear.complete, 1);
  EXPECT_EQ(clear.near_ties + clear.bf16_ties, 0);
  EXPECT_EQ(clear.pairs, 1);
  EXPECT_EQ(count({1.0, 2.0, 0.0}, {3, 4}).complete, 0) << "neighbours of two copies";
  EXPECT_EQ(count({1.0, 2.0, 0.0}, {1, 2}).complete, 0);
  const RoutingCount tied = count({2.0, 2.0, 0.0}, {0, 1});
  EXPECT_EQ(tied.near_ties, 1);
  EXPECT_EQ(tied.bf16_ties, 1);
  const RoutingCount close = count({2.0, 2.001, 0.0}, {2, 3});
  EXPECT_EQ(close.near_ties, 0);
  EXPECT_EQ(close.bf16_ties, 1);
  EXPECT_EQ(count({2.0, 1.0, 1.0}, {0, 1}).near_ties, 0) << "a tie below the boundary does not matter";
}

}  // namespace
}  // namespace upcycle
