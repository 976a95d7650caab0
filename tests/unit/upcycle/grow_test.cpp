// N experts, C copies, G shards, f dense width, fe = f/G expert width, h hidden
#include "upcycle/grow.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "unit/upcycle/model.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

const std::string kMlp = "model.layers.1.mlp.";

std::vector<std::pair<std::string, Recipe>> recipes() {
  std::vector<std::pair<std::string, Recipe>> out;
  Dense dense(dense_architecture());
  const auto add = [&](const std::string& name, const RunConfig& config) { out.emplace_back(name, recipe_of(config, dense)); };
  add("copy", run(4, 1, 2));
  add("granular", run(16, 8, 8));
  RunConfig config = run(8, 4, 4);
  config.upcycle.scaling = Scaling::cube_root;
  add("cube root", config);
  config.moe.pre_softmax = true;
  add("cube root, pre-softmax", config);
  config = run(6, 2, 2);
  config.upcycle.noise = 0.05;
  add("noise", config);
  config = run(8, 2, 2);
  config.upcycle.drop = 0.4;
  add("drop", config);
  config.upcycle.drop_indices = DropIndices::per_matrix;
  config.upcycle.noise = 0.01;
  add("drop per matrix with noise", config);
  config = run(4, 1, 2);
  config.moe.layers_text = "[1]";
  add("one MoE layer of three", config);
  for (const auto order : {UnitOrder::random, UnitOrder::clusters}) {
    const std::string name = order == UnitOrder::random ? "random order" : "clusters";
    config = run(8, 4, 4);
    config.upcycle.permutation = order;
    add(name, config);
    config.upcycle.drop = 0.4;
    config.upcycle.noise = 0.01;
    add(name + ", drop, noise", config);
    config = run(3, 1, 1);
    config.upcycle.permutation = order;
    add(name + ", whole", config);
  }
  return out;
}

TEST(Grow, AnyNumberOfThreadsDrawsTheSameNumbers) {
  const ParameterSpec spec{.name = "model.embed_tokens.weight", .shape = {700, 96}, .cuts = {}, .role = Role::embedding};
  const Box box{{3, 2}, {650, 90}};
  const int before = at::get_num_threads();
  std::vector<Tensor> drawn;
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    const Tensor room = at::full({90, 650}, 7.0);
    initialise(spec, box, dense_architecture(), 5, room.t());
    drawn.push_back(room);
  }
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(drawn[0], drawn[1]));
  const Random random(5, spec.name + "/init");
  EXPECT_EQ(drawn[1][89][649].item<float>(), static_cast<float>(0.02 * random.normal(652 * 96 + 91)));
}

TEST(Grow, AnyBoxHasTheNumbersOfTheWhole) {
  Dense dense(dense_architecture());
  for (const auto& [name, recipe] : recipes()) {
    for (const ParameterSpec& spec : catalogue(recipe.moe)) {
      const Tensor all = grown(spec, recipe, dense);
      const Random random(3, spec.name);
      for (uint64_t trial = 0; trial < 6; ++trial) {
        Box box = whole(spec.shape);
        for (size_t d = 0; d < box.size.size(); ++d) {
          box.begin[d] = static_cast<int64_t>(random.below(static_cast<uint64_t>(spec.shape[d]), trial * 10 + d));
          box.size[d] = static_cast<int64_t>(random.below(static_cast<uint64_t>(spec.shape[d] - box.begin[d] + 1), trial * 10 + d + 5));
        }
        ASSERT_TRUE(at::equal(grown(spec, box, recipe, dense), slice(all, box))) << name << ": " << spec.name << describe(box);
      }
    }
  }
}

TEST(Grow, BoxByBoxWithOneMemoryIsTheWhole) {
  for (const auto& [name, recipe] : recipes()) {
    SCOPED_TRACE(name);
    Dense dense(dense_architecture());
    ExpertFacts facts;
    for (const ParameterSpec& spec : catalogue(recipe.moe)) {
      const Tensor expected = grown(spec, recipe, dense), found = at::zeros(spec.shape, at::kFloat);
      // Rows of an expert, and of several experts, in order: as a file is written.
      const int64_t rows = spec.shape.size() == 3 ? spec.shape[1] : 1, outer = spec.shape[0];
      for (int64_t o = 0; o < outer; ++o) {
        for (int64_t row = 0; row < rows; row += 3) {
          Box box = whole(spec.shape);
          box.begin[0] = o, box.size[0] = 1;
          if (spec.shape.size() == 3) box.begin[1] = row, box.size[1] = std::min<int64_t>(3, rows - row);
          grow(spec, box, recipe, dense.reader(), slice(found, box), &facts);
        }
      }
      EXPECT_TRUE(at::equal(found, expected)) << spec.name;
    }
  }
}

TEST(Grow, StatisticsAreMadeOnceForAllBoxesOfAnExpert) {
  Dense dense(dense_architecture());
  RunConfig config = run(4, 1, 2);
  config.upcycle.drop = 0.4, config.upcycle.noise = 0.1;
  const Recipe recipe = recipe_of(config, dense);
  const std::vector<ParameterSpec> specs = catalogue(recipe.moe);
  const ParameterSpec spec = find(specs, kMlp + "experts.up_proj.weight");
  ExpertFacts facts;
  dense.reads.clear();
  for (int64_t row = 0; row < spec.shape[1]; ++row) {
    const Box box{{2, row, 0}, {1, 1, spec.shape[2]}};
    grow(spec, box, recipe, dense.reader(), at::zeros(box.size, at::kFloat), &facts);
  }
  int64_t elements_read = 0;
  for (const auto& [name, box] : dense.reads) elements_read += elements(box);
  EXPECT_EQ(elements_read, 3 * spec.shape[1] * spec.shape[2]) << "twice for mean and deviation, and once for the values";
}

TEST(Grow, ATargetOfTheSourcesDtypeIsAllowedWhereNothingIsRounded) {
  int64_t direct = 0;
  for (const auto& [name, recipe] : recipes()) {
    Dense dense(dense_architecture());
    for (const ParameterSpec& spec : catalogue(recipe.moe)) {
      const Tensor target = at::zeros(spec.shape, at::kBFloat16);
      if (!keeps(spec, recipe, at::kBFloat16)) {
        EXPECT_THROW(grow(spec, whole(spec.shape), recipe, dense.reader(), target), std::logic_error) << name << spec.name;
        continue;
      }
      grow(spec, whole(spec.shape), recipe, dense.reader(), target);
      EXPECT_TRUE(at::equal(target.to(at::kFloat), grown(spec, recipe, dense))) << name << spec.name;
      direct += spec.role == Role::expert;
      EXPECT_FALSE(recipe.noise > 0 && spec.role == Role::expert);
    }
  }
  EXPECT_GT(direct, 0);
}

TEST(Grow, FillsStridedViewsAndNothingBesideThem) {
  Dense dense(dense_architecture());
  for (const auto& [name, recipe] : recipes()) {
    const auto specs = catalogue(recipe.moe);
    // gate and up share one tensor in memory: [N, 2*fe, h].
    const ParameterSpec &gate = find(specs, kMlp + "experts.gate_proj.weight"), &up = find(specs, kMlp + "experts.up_proj.weight");
    const int64_t fe = recipe.moe.expert_ffn;
    const Tensor both = at::full({recipe.moe.experts, 2 * fe, recipe.moe.hidden}, -9.0, at::kFloat);
    grow(up, whole(up.shape), recipe, dense.reader(), both.narrow(1, fe, fe));
    EXPECT_TRUE(at::equal(both.narrow(1, fe, fe), grown(up, recipe, dense))) << name;
    EXPECT_TRUE(at::equal(both.narrow(1, 0, fe), at::full({recipe.moe.experts, fe, recipe.moe.hidden}, -9.0, at::kFloat))) << name;
    grow(gate, whole(gate.shape), recipe, dense.reader(), both.narrow(1, 0, fe));
    EXPECT_TRUE(at::equal(both.narrow(1, 0, fe), grown(gate, recipe, dense))) << name;
    const ParameterSpec router = find(specs, kMlp + "gate.weight");
    const Tensor columns = at::full({recipe.moe.hidden, recipe.moe.experts}, -9.0, at::kFloat);
    grow(router, whole(router.shape), recipe, dense.reader(), columns.t());
    EXPECT_TRUE(at::equal(columns.t(), grown(router, recipe, dense))) << name;
  }
}

TEST(Grow, ExpertIsItsShardTimesTheFactorBitForBit) {
  Dense dense(dense_architecture());
  const Recipe recipe = make_recipe(dense_architecture(), run(16, 8, 8));
  const auto specs = catalogue(recipe.moe);
  const int64_t fe = 32 / 8;
  for (const int64_t e : {0, 5, 8, 13, 15}) {
    const int64_t g = e % 8;
    const auto expert = [&](const char* matrix) { return grown(find(specs, kMlp + "experts." + matrix + ".weight"), recipe, dense).select(0, e); };
    const auto shard = [&](const char* matrix, int64_t dim) { return dense.tensors.at(kMlp + matrix + ".weight").to(at::kFloat).narrow(dim, g * fe, fe); };
    EXPECT_TRUE(at::equal(expert("gate_proj"), shard("gate_proj", 0))) << e;
    EXPECT_TRUE(at::equal(expert("up_proj"), shard("up_proj", 0) * 2.0)) << e;
    EXPECT_TRUE(at::equal(expert("down_proj"), shard("down_proj", 1) * 4.0)) << e;
    EXPECT_TRUE(at::equal(expert("down_proj").to(at::kBFloat16).to(at::kFloat), expert("down_proj"))) << "nothing lost in bf16";
  }
}

TEST(Grow, WhatIsNotAnExpertIsTheDenseTensor) {
  Dense dense(dense_architecture());
  RunConfig config = run(4, 1, 2);
  config.moe.layers_text = "first-dense:1";
  config.upcycle.drop = 0.5;
  const Recipe recipe = make_recipe(dense_architecture(), config);
  int64_t copied = 0;
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    if (spec.role == Role::expert || spec.role == Role::router) continue;
    EXPECT_TRUE(at::equal(grown(spec, recipe, dense), dense.tensors.at(spec.name).to(at::kFloat))) << spec.name;
    ++copied;
  }
  EXPECT_EQ(copied, 2 + 3 * 8 + 3);
}

TEST(Grow, ReadsOnlyTheSlicesItNeedsAndEachOnce) {
  Dense dense(dense_architecture());
  const Recipe recipe = make_recipe(dense_architecture(), run(16, 8, 8));
  const auto specs = catalogue(recipe.moe);
  grown(find(specs, kMlp + "experts.down_proj.weight"), {{8, 0, 1}, {4, 12, 2}}, recipe, dense);
  ASSERT_EQ(dense.reads.size(), 4u);  // shards 0-3 of copy 1
  for (int64_t g = 0; g < 4; ++g) {
    EXPECT_EQ(dense.reads[static_cast<size_t>(g)].first, kMlp + "down_proj.weight");
    EXPECT_EQ(dense.reads[static_cast<size_t>(g)].second, (Box{{0, g * 4 + 1}, {12, 2}}));
  }
  dense.reads.clear();
  grown(find(specs, kMlp + "experts.up_proj.weight"), recipe, dense);
  EXPECT_EQ(dense.reads.size(), 8u) << "one read a shard serves both copies";
}

TEST(Grow, RouterRowsAreTiedInsideACopyAndDifferBetweenCopies) {
  for (const auto dtype : {at::kBFloat16, at::kFloat}) {
    Architecture a = dense_architecture(dtype);
    a.hidden = 400;
    Dense dense(dense_architecture());
    const Recipe recipe = make_recipe(a, run(32, 4, 4));
    const Tensor rows = grown(find(catalogue(recipe.moe), kMlp + "gate.weight"), recipe, dense);
    for (int64_t e = 0; e < 32; ++e) {
      EXPECT_TRUE(at::equal(rows[e], rows[e / 4 * 4])) << e;
      if (e >= 4) EXPECT_FALSE(at::equal(rows[e], rows[e - 4])) << e;
    }
    const double rms = std::sqrt((rows * rows).mean().item<double>());
    EXPECT_NEAR(rms, 1.4 / std::sqrt(400.0), 0.05 * rms);  // 3,200 independent numbers: one sigma is 1.3 %
    EXPECT_EQ(at::equal(rows.to(at::kBFloat16).to(at::kFloat), rows), dtype == at::kBFloat16);
  }
}

TEST(Grow, SeedsDrawOtherRoutersAndLayersDiffer) {
  Dense dense(dense_architecture());
  RunConfig config = run(4, 1, 2);
  const Recipe one = make_recipe(dense_architecture(), config);
  config.run.seed = 99;
  const Recipe other = make_recipe(dense_architecture(), config);
  const auto specs = catalogue(one.moe);
  const ParameterSpec router = find(specs, kMlp + "gate.weight");
  EXPECT_FALSE(at::equal(grown(router, one, dense), grown(router, other, dense)));
  EXPECT_FALSE(at::equal(grown(router, one, dense), grown(find(specs, "model.layers.2.mlp.gate.weight"), one, dense)));
}

/// The hidden units of expert e of a matrix that are not the dense ones.
std::set<int64_t> changed_units(const std::string& matrix, int64_t e, const Recipe& recipe, Dense& dense) {
  const bool down = matrix == "down_proj";
  const int64_t fe = recipe.moe.expert_ffn, g = e % recipe.granularity;
  const double factor = down ? recipe.down_factor : matrix == "up_proj" ? recipe.up_factor : recipe.gate_factor;
  const Tensor expert = grown(find(catalogue(recipe.moe), kMlp + "experts." + matrix + ".weight"), recipe, dense).select(0, e);
  const Tensor expected = dense.tensors.at(kMlp + matrix + ".weight").to(at::kFloat).narrow(down, g * fe, fe) * factor;
  std::set<int64_t> out;
  for (int64_t unit = 0; unit < fe; ++unit) {
    if (!at::equal(expert.select(down, unit), expected.select(down, unit))) out.insert(unit);
  }
  return out;
}

TEST(Grow, DropDrawsExactlySoManyUnitsAnew) {
  Dense dense(dense_architecture());
  for (const auto how : {DropIndices::shared, DropIndices::per_matrix}) {
    RunConfig config = run(8, 2, 2);
    config.upcycle.drop = 0.4;
    config.upcycle.drop_indices = how;
    const Recipe recipe = make_recipe(dense_architecture(), config);
    std::set<std::set<int64_t>> over_experts;
    int shared = 0;
    for (int64_t e = 0; e < 8; ++e) {
      const auto gate = changed_units("gate_proj", e, recipe, dense), up = changed_units("up_proj", e, recipe, dense),
                 down = changed_units("down_proj", e, recipe, dense);
      EXPECT_EQ(gate.size(), 6u);  // floor(0.4 * 16)
      EXPECT_EQ(up.size(), 6u);
      EXPECT_EQ(down.size(), 6u);
      shared += gate == up && up == down;
      over_experts.insert(gate);
    }
    EXPECT_EQ(shared, how == DropIndices::shared ? 8 : 0);
    EXPECT_EQ(over_experts.size(), 8u) << "every expert draws its own";
  }
}

TEST(Grow, DroppedUnitsHaveTheStatisticsOfWhatTheyReplace) {
  Architecture a = dense_architecture(at::kFloat);
  a.hidden = 300, a.ffn = 200;
  Dense dense(a);
  RunConfig config = run(2, 1, 1);
  config.upcycle.drop = 0.5;
  const Recipe recipe = make_recipe(a, config);
  for (const std::string matrix : {"gate_proj", "down_proj"}) {
    const int64_t dim = matrix == "down_proj";
    const Tensor expert = grown(find(catalogue(recipe.moe), kMlp + "experts." + matrix + ".weight"), recipe, dense).select(0, 1);
    const Tensor before = dense.tensors.at(kMlp + matrix + ".weight");
    double sum[2] = {}, square[2] = {}, product = 0, count = 0;
    for (const int64_t unit : changed_units(matrix, 1, recipe, dense)) {
      const Tensor x = before.select(dim, unit).to(at::kDouble), y = expert.select(dim, unit).to(at::kDouble);
      sum[0] += x.sum().item<double>(), sum[1] += y.sum().item<double>();
      square[0] += (x * x).sum().item<double>(), square[1] += (y * y).sum().item<double>();
      product += (x * y).sum().item<double>();
      count += 300;
    }
    const double mean0 = sum[0] / count, mean1 = sum[1] / count;
    const double std0 = std::sqrt(square[0] / count - mean0 * mean0), std1 = std::sqrt(square[1] / count - mean1 * mean1);
    EXPECT_EQ(count, 30000);
    EXPECT_NEAR(mean1, mean0, 5 * std0 / std::sqrt(count)) << matrix;
    EXPECT_NEAR(std1, std0, 5 * std0 / std::sqrt(2 * count)) << matrix;
    EXPECT_NEAR(product / count - mean0 * mean1, 0.0, 5 * std0 * std0 / std::sqrt(count)) << matrix << ": independent of the old values";
  }
}

TEST(Grow, NoiseIsRelativeToTheSlice) {
  Architecture a = dense_architecture(at::kFloat);
  a.hidden = 300, a.ffn = 200;
  Dense dense(a);
  RunConfig config = run(4, 2, 2);
  config.upcycle.noise = 0.02;
  const Recipe recipe = make_recipe(a, config);
  const Tensor experts = grown(find(catalogue(recipe.moe), kMlp + "experts.down_proj.weight"), recipe, dense);
  for (int64_t e = 0; e < 4; ++e) {
    const Tensor expected = dense.tensors.at(kMlp + "down_proj.weight").narrow(1, e % 2 * 100, 100) * recipe.down_factor;
    const Tensor noise = experts.select(0, e) - expected;
    EXPECT_NEAR((noise.norm() / expected.norm()).item<double>(), 0.02, 0.0005) << e;
    const double count = 30000, rms = expected.norm().item<double>() / std::sqrt(count);
    EXPECT_NEAR(noise.mean().item<double>(), 0.0, 5 * 0.02 * rms / std::sqrt(count)) << e;
  }
  EXPECT_FALSE(at::equal(experts.select(0, 0), experts.select(0, 2))) << "copies differ";
}

TEST(Initialise, NormsAreOneAndMatricesNormal) {
  Architecture a = dense_architecture();
  a.hidden = 64, a.ffn = 96;
  for (const ParameterSpec& spec : catalogue(a)) {
    const Tensor all = at::zeros(spec.shape, at::kFloat);
    initialise(spec, whole(spec.shape), a, 5, all);
    if (spec.role == Role::norm) {
      EXPECT_TRUE(at::equal(all, at::full(spec.shape, 1.0, at::kFloat))) << spec.name;
      continue;
    }
    const double expected = spec.residual ? 0.02 / std::sqrt(6.0) : 0.02, count = static_cast<double>(all.numel());
    EXPECT_NEAR(all.std().item<double>(), expected, 5 * expected / std::sqrt(2 * count)) << spec.name;
    EXPECT_NEAR(all.mean().item<double>(), 0.0, 5 * expected / std::sqrt(count)) << spec.name;
    const Box box{{1, 2}, {spec.shape[0] - 3, spec.shape[1] - 2}};
    const Tensor part = at::zeros(box.size, at::kFloat);
    initialise(spec, box, a, 5, part);
    EXPECT_TRUE(at::equal(part, slice(all, box))) << spec.name;
  }
}

TEST(Grow, WrongTargetsAreFaults) {
  Dense dense(dense_architecture());
  const Recipe recipe = make_recipe(dense_architecture(), run(4, 1, 2));
  const ParameterSpec spec = find(catalogue(recipe.moe), "model.norm.weight");
  EXPECT_THROW(grow(spec, {{0}, {13}}, recipe, dense.reader(), at::zeros({13})), std::logic_error);
  EXPECT_THROW(grow(spec, {{0}, {12}}, recipe, dense.reader(), at::zeros({11})), std::logic_error);
  EXPECT_THROW(grow(spec, {{0}, {12}}, recipe, dense.reader(), at::zeros({12}, at::kDouble)), std::logic_error);
}

}  // namespace
}  // namespace upcycle
