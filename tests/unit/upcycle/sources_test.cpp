// What grows out of a mixture, and out of several dense models. n experts of a mixture, C copies of each; G shards
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "unit/upcycle/model.hpp"
#include "upcycle/certificate.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

Architecture mixture_architecture() {
  Architecture a = dense_architecture();
  a.experts = 5, a.top_k = 2, a.expert_ffn = 8, a.dense_layers = {2};
  return a;
}

/// Certificate of the whole model that `recipe` promises, of these values.
Certificate judged(const Recipe& recipe, const std::map<std::string, Tensor>& values, const ReadDense& read) {
  Certificate out(recipe);
  for (const ParameterSpec& spec : catalogue(recipe.moe)) out.weights.check(spec, whole(spec.shape), values.at(spec.name), recipe, read);
  return out;
}

std::map<std::string, Tensor> everything(const Recipe& recipe, const ReadDense& read) {
  std::map<std::string, Tensor> out;
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    out[spec.name] = at::zeros(spec.shape, at::kFloat);
    grow(spec, whole(spec.shape), recipe, read, out[spec.name]);
  }
  return out;
}

TEST(LargerMixture, ExpertsAndRowsAreTheSourcesSideBySide) {
  Dense source(mixture_architecture());
  const Recipe recipe = make_recipe(mixture_architecture(), run(15, 1, 6));
  const auto values = everything(recipe, source.reader());
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    const Tensor before = source.tensors.at(spec.name).to(at::kFloat);
    const bool per_expert = spec.role == Role::expert || spec.role == Role::router;
    EXPECT_TRUE(at::equal(values.at(spec.name), per_expert ? before.repeat_interleave(3, 0) : before)) << spec.name;
    EXPECT_TRUE(at::equal(dense_slice(spec, whole(spec.shape), recipe, source.reader()), values.at(spec.name))) << spec.name;
  }
  EXPECT_TRUE(judged(recipe, values, source.reader()).passed());
}

TEST(LargerMixture, AnyBoxHasTheNumbersOfTheWhole) {
  Dense source(mixture_architecture());
  RunConfig disturbed = run(10, 1, 4);
  disturbed.upcycle.noise = 0.1, disturbed.upcycle.drop = 0.25;
  for (const RunConfig& config : {run(10, 1, 4), disturbed}) {
    const Recipe recipe = make_recipe(mixture_architecture(), config);
    const auto values = everything(recipe, source.reader());
    for (const ParameterSpec& spec : catalogue(recipe.moe)) {
      Box box = whole(spec.shape);
      for (size_t d = 0; d < box.size.size(); ++d) box.begin[d] = 1, box.size[d] -= 2;
      EXPECT_TRUE(at::equal(grown(spec, box, recipe, source), slice(values.at(spec.name), box))) << spec.name;
    }
    EXPECT_TRUE(judged(recipe, values, source.reader()).passed());
    EXPECT_EQ(judged(recipe, values, source.reader()).weights.altered > 0, recipe.noise > 0);
  }
}

TEST(LargerMixture, TheCertificateSeesAnotherOrderAndALostRow) {
  Dense source(mixture_architecture());
  const Recipe recipe = make_recipe(mixture_architecture(), run(10, 1, 4));
  auto values = everything(recipe, source.reader());
  Tensor& router = values["model.layers.1.mlp.gate.weight"];
  const Tensor good = router.clone();
  router = at::cat({source.tensors.at("model.layers.1.mlp.gate.weight"), source.tensors.at("model.layers.1.mlp.gate.weight")}).to(at::kFloat);   // e, e + n
  EXPECT_FALSE(judged(recipe, values, source.reader()).passed());
  router = good.clone();
  router[7][3] += 0.5;
  EXPECT_EQ(judged(recipe, values, source.reader()).weights.mismatches, 1);
  router = good;
  values["model.layers.0.mlp.experts.down_proj.weight"][3][2][1] += 0.5;
  EXPECT_EQ(judged(recipe, values, source.reader()).weights.mismatches, 1);
}

TEST(LargerMixture, TheRecipeComesBack) {
  RunConfig config = run(10, 1, 4);
  config.upcycle.noise = 0.5;
  const Recipe recipe = make_recipe(mixture_architecture(), config);
  const Recipe back = recipe_from_json(to_json(recipe), recipe.moe, "");
  EXPECT_EQ(back.source, recipe.source);
  EXPECT_EQ(to_json(back), to_json(recipe));
}

/// Two dense models of one shape.
struct Two {
  Two() : first(dense_architecture()), second(dense_architecture()) {
    for (auto& [name, value] : second.tensors) value = value.flip(0).mul(0.75).contiguous();
  }
  ReadDense reader() {
    const auto one = [](Dense& dense) { return [&dense](const std::string& name, const Box& box) { return slice(dense.tensors.at(name), box); }; };
    return ReadDense({one(first), one(second)});
  }
  Dense first, second;
};

RunConfig of_two(int64_t experts, int64_t granularity, int64_t top_k, UnitOrder order = UnitOrder::identity) {
  RunConfig config = run(experts, granularity, top_k);
  config.source.models = {"first", "second"};
  config.source.quotas = {experts / granularity - 1, 1};
  config.upcycle.permutation = order;
  return config;
}

TEST(SeveralSources, ACopyIsOfItsSourceAndTheRestIsTheMean) {
  Two two;
  const Recipe recipe = make_recipe(dense_architecture(), of_two(12, 4, 4));
  RunConfig alone = run(12, 4, 4);
  const Recipe single = make_recipe(dense_architecture(), alone);
  const auto values = everything(recipe, two.reader());
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    if (spec.role == Role::router) continue;
    const Tensor of_first = grown(spec, single, two.first), of_second = grown(spec, single, two.second);
    if (spec.role == Role::expert) {
      EXPECT_TRUE(at::equal(values.at(spec.name).narrow(0, 0, 8), of_first.narrow(0, 0, 8))) << spec.name;
      EXPECT_TRUE(at::equal(values.at(spec.name).narrow(0, 8, 4), of_second.narrow(0, 8, 4))) << spec.name;
    } else {
      EXPECT_TRUE(at::equal(values.at(spec.name), (of_first.to(at::kDouble) + of_second.to(at::kDouble)).div(2).to(at::kFloat))) << spec.name;
    }
  }
}

TEST(SeveralSources, TheCertificateKnowsWhoseCopyItIs) {
  Two two;
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    Recipe recipe = make_recipe(dense_architecture(), of_two(12, 4, 4, order));
    for (int64_t layer = 0; order == UnitOrder::clusters && layer < 3; ++layer) recipe.clusters[layer] = cluster_units(recipe, layer, two.reader());
    const auto values = everything(recipe, two.reader());
    EXPECT_TRUE(judged(recipe, values, two.reader()).passed());
    Recipe other = recipe;
    other.quotas = {1, 2};
    EXPECT_FALSE(judged(other, values, two.reader()).passed());
    EXPECT_EQ(recipe_from_json(to_json(recipe), recipe.moe, clusters_to_text(recipe)).quotas, recipe.quotas);
    auto averaged = values;
    averaged["model.norm.weight"][3] = two.first.tensors.at("model.norm.weight")[3].item<float>() + 1;
    EXPECT_EQ(judged(recipe, averaged, two.reader()).weights.mismatches, 1);
  }
}

TEST(SeveralSources, TheMeanOfEqualsIsEach) {
  Dense dense(dense_architecture());
  const auto one = [&](const std::string& name, const Box& box) { return slice(dense.tensors.at(name), box); };
  const ReadDense thrice({one, one, one});
  for (const ParameterSpec& spec : dense.specs) {
    EXPECT_TRUE(at::equal(thrice(spec.name, whole(spec.shape)), dense.tensors.at(spec.name).to(at::kFloat))) << spec.name;
  }
}

TEST(SeveralSources, AnyBoxHasTheNumbersOfTheWhole) {
  Two two;
  const Recipe recipe = make_recipe(dense_architecture(), of_two(12, 4, 4, UnitOrder::random));
  const auto values = everything(recipe, two.reader());
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    Box box = whole(spec.shape);
    for (size_t d = 0; d < box.size.size(); ++d) box.begin[d] = 1, box.size[d] -= 2;
    const Tensor part = at::zeros(box.size, at::kFloat);
    grow(spec, box, recipe, two.reader(), part);
    EXPECT_TRUE(at::equal(part, slice(values.at(spec.name), box))) << spec.name;
  }
}

}  // namespace
}  // namespace upcycle
