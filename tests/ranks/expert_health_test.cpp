// The look at the experts of a model that lies on many ranks gives what one sees who has all of it in one place: the weights are
// gathered, and whole experts are compared pair by pair.
#include "train/expert_health.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "base/error.hpp"
#include "parallel/every_layout.hpp"
#include "support/tiny_training.hpp"

namespace upcycle {
namespace {

constexpr double kBound = 1e-6;

RunConfig run_of(int64_t experts, int64_t granularity, const ParallelSection& parallel, Precision precision) {
  RunConfig run;
  run.parallel = parallel;
  run.moe_given = true, run.moe.experts = experts, run.moe.granularity = granularity, run.moe.top_k = granularity;
  run.moe.layers_text = "[0, 2, 3]";
  run.train.sequence = 32, run.train.global_batch = 4, run.train.micro_batch = 1, run.train.precision = precision;
  return run;
}

Architecture dense_model() {
  Architecture a;
  a.hidden = 32, a.layers = 4, a.heads = 8, a.kv_heads = 2, a.head_dim = 8, a.ffn = 48, a.vocab = 96, a.tied = true;
  a.dtype = at::kBFloat16;
  return a;
}

/// A model that no file holds; in bf16, as stored.
ReadDense::One one_reader(const Architecture& model, uint64_t seed = 5) {
  return [model, seed](const std::string& name, const Box& box) {
    const Tensor x = at::empty(box.size, at::kFloat);
    initialise(find(catalogue(model), name), box, model, seed, x);
    return x.to(at::kBFloat16);
  };
}

ReadDense dense_reader(const Architecture& dense) { return ReadDense(one_reader(dense)); }

/// The freshly grown weights of this rank; `change(spec, expert, values)` changes those of one expert before they are rounded.
using Change = std::function<void(const ParameterSpec& spec, int64_t expert, Tensor values)>;
struct Grown {
  Grown(const RunConfig& run, const Recipe& recipe, const ReadDense& read, const Change& change = {})
      : mesh(Grid(run.parallel, world_size())),
        stage(recipe.moe, make_layout(recipe.moe, mesh.grid(), run.parallel), mesh, model_settings(run)) {
    mesh.prepare(at::kCPU, Transport::automatic);
    stage.weights().allocate(run.train.precision == Precision::bf16 ? at::kBFloat16 : at::kFloat, at::kCPU, run.parallel.zero);
    fill_masters(stage.weights(), [&](const ParameterSpec& spec, const Box& box, Tensor target) {
      grow(spec, box, recipe, read, target);
      if (!change || spec.role != Role::expert) return;
      for (int64_t i = 0; i < box.size[0]; ++i) change(spec, box.begin[0] + i, target[i]);
    });
  }
  Mesh mesh;
  Stage stage;
};

/// The whole of a parameter in fp64: the first holder of each box gives it. Collective.
Tensor gathered(const ParameterSpec& spec, Weights& weights, const Mesh& mesh) {
  Tensor whole = at::zeros(spec.shape, at::kDouble);
  const int rank = mesh.world().rank();
  for (Weight& weight : weights.all()) {
    for (const Part& part : weight.parts) {
      if (part.spec.name != spec.name || holders(spec, weights.layout(), rank).front() != rank) continue;
      Tensor box = whole;
      for (int64_t d = 0; d < 3; ++d) box = box.narrow(d, part.box.begin[static_cast<size_t>(d)], part.box.size[static_cast<size_t>(d)]);
      box.copy_(part.of(weight.parameter.arrived()));
    }
  }
  mesh.world().all_reduce(whole);
  return whole;
}

/// The same numbers, from whole experts side by side.
std::vector<LayerHealth> brute_force(Weights& weights, const Mesh& mesh, const Recipe* recipe, const ReadDense* read, at::ScalarType compute) {
  std::vector<LayerHealth> out;
  const Architecture& architecture = weights.architecture();
  const std::vector<ParameterSpec> all = catalogue(architecture);
  // Side by side lie the shards of a copy, or the copies of a source's expert.
  const int64_t N = architecture.experts, G = !recipe ? 1 : recipe->of_mixture() ? recipe->copies : recipe->granularity;
  for (int64_t layer = 0; layer < architecture.layers; ++layer) {
    if (!architecture.is_moe_layer(layer)) continue;
    std::vector<Tensor> own(static_cast<size_t>(N)), dense(own);
    for (const char* const matrix : {"gate", "up", "down"}) {
      const ParameterSpec spec = find(all, text("model.layers.", layer, ".mlp.experts.", matrix, "_proj.weight"));
      const Tensor values = gathered(spec, weights, mesh);
      const int64_t unit_dim = std::string(matrix) == "down" ? 1 : 0;
      const double factor = !recipe ? 1 : unit_dim ? recipe->down_factor : matrix[0] == 'u' ? recipe->up_factor : recipe->gate_factor;
      for (int64_t e = 0; e < N; ++e) {
        const auto put = [&](Tensor& x, const Tensor& more) { x = x.defined() ? at::cat({x, more.reshape({-1})}) : more.reshape({-1}); };
        put(own[static_cast<size_t>(e)], values[e]);
        if (!read) continue;
        Box slice{{0, 0}, {spec.shape[1], spec.shape[2]}};
        slice.begin[static_cast<size_t>(unit_dim)] = e % G * spec.shape[static_cast<size_t>(1 + unit_dim)];
        const Tensor d = (*read)(text("model.layers.", layer, ".mlp.", matrix, "_proj.weight"), slice).to(at::kFloat) * factor;
        put(dense[static_cast<size_t>(e)], d.to(compute).to(at::kDouble));
      }
    }
    LayerHealth& health = out.emplace_back();
    health.layer = layer;
    double sum[3] = {}, pairs[3] = {};   // all, between, inside
    for (int64_t a = 0; a < N; ++a) {
      for (int64_t b = 0; b < a; ++b) {
        const Tensor &x = own[static_cast<size_t>(a)], &y = own[static_cast<size_t>(b)];
        const double cosine = at::dot(x, y).item<double>() / (x.norm().item<double>() * y.norm().item<double>());
        const bool same_block = a / G == b / G, same_place = a % G == b % G;
        const int kind = (recipe && recipe->of_mixture() ? same_place : same_block) ? 2 : same_block || same_place ? 1 : 0;
        sum[0] += cosine, ++pairs[0];
        if (kind) sum[kind] += cosine, ++pairs[kind];
      }
      if (read) {
        const Tensor& d = dense[static_cast<size_t>(a)];
        health.distance.push_back(((own[static_cast<size_t>(a)] - d).norm() / d.norm()).item<double>());
      }
    }
    health.cosine = sum[0] / pairs[0];
    if (recipe && pairs[1]) health.cosine_between = sum[1] / pairs[1];
    if (recipe && pairs[2]) health.cosine_inside = sum[2] / pairs[2];
  }
  return out;
}

void expect_near(double ours, double theirs, const char* what) {
  if (std::isnan(theirs)) {
    EXPECT_TRUE(std::isnan(ours)) << what << " is " << ours;
  } else {
    EXPECT_NEAR(ours, theirs, kBound) << what;
  }
}

void expect_same(const std::vector<LayerHealth>& ours, const std::vector<LayerHealth>& theirs) {
  ASSERT_EQ(ours.size(), theirs.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    SCOPED_TRACE(text("layer ", theirs[i].layer));
    EXPECT_EQ(ours[i].layer, theirs[i].layer);
    expect_near(ours[i].cosine, theirs[i].cosine, "cosine");
    expect_near(ours[i].cosine_between, theirs[i].cosine_between, "between");
    expect_near(ours[i].cosine_inside, theirs[i].cosine_inside, "inside");
    ASSERT_EQ(ours[i].distance.size(), theirs[i].distance.size());
    for (size_t e = 0; e < ours[i].distance.size(); ++e) expect_near(ours[i].distance[e], theirs[i].distance[e], "distance");
  }
}

/// visit(run, recipe, compute dtype) for a fixed spread of the layouts of these ranks that take the model (with UPCYCLE_ALL_LAYOUTS
/// every one), granularity and precision in turn.
template <class Visit>
void on_layouts(Visit&& visit) {
  constexpr size_t kSpread = 16;
  const Architecture dense = dense_model();
  std::vector<std::pair<RunConfig, Recipe>> all;
  size_t turn = 0;
  for (const ParallelSection& parallel : every_layout(world_size())) {
    const int64_t granularity = std::array{4, 1, 2}[turn / 2 % 3];   // zero 0 and 1 of a layout follow one another
    const Precision precision = turn++ / 6 % 2 ? Precision::fp32 : Precision::bf16;
    const RunConfig run = run_of(4 * granularity, granularity, parallel, precision);
    const Recipe recipe = make_recipe(dense, run);
    if (parallel.pipeline * parallel.virtual_stages > dense.layers || !check_layout(run, recipe.moe, world_size()).problems.empty()) continue;
    all.emplace_back(run, recipe);
  }
  const size_t taken = std::getenv("UPCYCLE_ALL_LAYOUTS") ? all.size() : std::min(all.size(), kSpread);
  for (size_t i = 0; i < taken; ++i) {
    const auto& [run, recipe] = all[i * all.size() / taken];
    const ParallelSection& p = run.parallel;
    SCOPED_TRACE(text("granularity ", recipe.granularity, ", tensor ", p.tensor, ", context ", p.context, ", pipeline ", p.pipeline, " x ", p.virtual_stages,
                      ", expert ", p.expert, ", expert_tensor ", p.expert_tensor, ", zero ", p.zero));
    visit(run, recipe, run.train.precision == Precision::bf16 ? at::kBFloat16 : at::kFloat);
  }
  if (world_rank() == 0) std::cout << taken << " of " << all.size() << " layouts\n";
}

TEST(ExpertHealth, FreshCopiesAreTheDenseModel) {
  const ReadDense read = dense_reader(dense_model());
  on_layouts([&](const RunConfig& run, const Recipe& recipe, at::ScalarType compute) {
    Grown grown(run, recipe, read);
    const auto [health, trouble] = look_at_experts(grown.stage.weights(), grown.mesh, &recipe, &read);
    EXPECT_EQ(trouble, "");
    expect_same(health, brute_force(grown.stage.weights(), grown.mesh, &recipe, &read, compute));
    ASSERT_EQ(health.size(), 3u);
    for (const LayerHealth& layer : health) {
      EXPECT_NEAR(layer.cosine_between, 1.0, kBound);
      EXPECT_EQ(std::isnan(layer.cosine_inside), recipe.granularity == 1);
      for (const double distance : layer.distance) EXPECT_EQ(distance, 0.0);
    }
  });
}

TEST(ExpertHealth, PlantedChangesGiveTheRightNumbers) {
  health_piece_elements = 300;   // many pieces, some of a single row
  const ReadDense read = dense_reader(dense_model());
  // Experts of copy 0 turned round; expert 1 of layer 2 half as long again; layer 3 shaken, each expert by its own amount.
  const Change change = [](const ParameterSpec& spec, int64_t e, Tensor values) {
    const int64_t G = 48 / spec.shape[spec.name.find("down") == std::string::npos ? 1 : 2];
    if (spec.layer == 0 && e < G) values.neg_();
    if (spec.layer == 2 && e == 1) values.mul_(1.5);
    if (spec.layer == 3) values.mul_(1.0 + 0.1 * static_cast<double>(e)).add_(values.abs(), 0.05 * static_cast<double>(e));
  };
  on_layouts([&](const RunConfig& run, const Recipe& recipe, at::ScalarType compute) {
    Grown grown(run, recipe, read, change);
    const std::vector<LayerHealth> health = look_at_experts(grown.stage.weights(), grown.mesh, &recipe, &read).layers;
    expect_same(health, brute_force(grown.stage.weights(), grown.mesh, &recipe, &read, compute));
    // Of 6 pairs of 4 copies 3 point the other way, in every shard.
    EXPECT_NEAR(health[0].cosine_between, 0.0, kBound);
    for (int64_t e = 0; e < recipe.moe.experts; ++e) {
      EXPECT_NEAR(health[0].distance[static_cast<size_t>(e)], e < recipe.granularity ? 2.0 : 0.0, kBound);
      EXPECT_NEAR(health[1].distance[static_cast<size_t>(e)], e == 1 ? 0.5 : 0.0, compute == at::kFloat ? kBound : 2e-3);
    }
    EXPECT_NEAR(health[1].cosine_between, 1.0, compute == at::kFloat ? kBound : 1e-5);
    EXPECT_LT(health[2].cosine_between, 0.999);
    EXPECT_GT(health[2].distance.back(), 0.3);
    // Nothing is known of where they came from: all pairs, and no more.
    const std::vector<LayerHealth> alone = look_at_experts(grown.stage.weights(), grown.mesh, nullptr, nullptr).layers;
    expect_same(alone, brute_force(grown.stage.weights(), grown.mesh, nullptr, nullptr, compute));
    EXPECT_NEAR(alone[2].cosine, health[2].cosine, kBound);
  });
  health_piece_elements = int64_t{1} << 22;
}

TEST(ExpertHealth, OtherWaysToGrow) {
  ParallelSection parallel;
  parallel.expert = world_size();
  struct Way {
    const char* name;
    Architecture source;
    RunConfig run;
    ReadDense read;
  };
  Architecture mixture = dense_model();
  mixture.experts = 4, mixture.top_k = 2, mixture.expert_ffn = 24;
  std::vector<Way> ways{{"hidden units in any order", dense_model(), run_of(8, 2, parallel, Precision::bf16), dense_reader(dense_model())},
                        {"two sources", dense_model(), run_of(8, 2, parallel, Precision::fp32), ReadDense({one_reader(dense_model(), 5), one_reader(dense_model(), 6)})},
                        {"out of a mixture", mixture, run_of(12, 1, parallel, Precision::bf16), dense_reader(mixture)}};
  ways[0].run.upcycle.permutation = UnitOrder::random;
  ways[1].run.source.models = {"a", "b"};
  ways[2].run.moe.layers_text = "all", ways[2].run.moe.top_k = 6;
  for (const Way& way : ways) {
    SCOPED_TRACE(way.name);
    const Recipe recipe = make_recipe(way.source, way.run);
    Grown grown(way.run, recipe, way.read);
    const auto [health, trouble] = look_at_experts(grown.stage.weights(), grown.mesh, &recipe, &way.read);
    EXPECT_EQ(trouble, "");
    std::vector<LayerHealth> wanted = brute_force(grown.stage.weights(), grown.mesh, &recipe, nullptr, at::kFloat);
    for (LayerHealth& layer : wanted) layer.distance.assign(static_cast<size_t>(recipe.moe.experts), 0.0);   // of each to its own source
    expect_same(health, wanted);
    if (recipe.of_mixture()) {
      EXPECT_NEAR(health[0].cosine_between, 1.0, kBound);
      EXPECT_LT(health[0].cosine_inside, 0.1);
    } else {
      EXPECT_LT(health[0].cosine_between, 0.6);
    }
  }
}

TEST(ExpertHealth, InTrainingWithDividedMasters) {
  TinyModel model = tiny_models(4)[2];
  ASSERT_TRUE(model.name.starts_with("granular"));
  Recipe recipe;
  recipe.moe = model.architecture;
  recipe.granularity = 4, recipe.copies = 4, recipe.up_factor = 2, recipe.down_factor = 2;
  Architecture dense = dense_model();
  dense.ffn = 64;   // of four shards
  recipe.source = dense;
  const ReadDense read = dense_reader(dense);
  RunConfig run = model.run;
  run.train.precision = Precision::bf16;
  run.optimizer.lr = 1e-2;
  run.parallel.zero = 1;
  for (const int expert : {1, 2}) {
    if (world_size() % expert) continue;
    run.parallel.expert = expert;
    TinyTraining training(model, run);
    training.step();
    training.step();   // whose values may still be on their way from their owners
    const std::vector<LayerHealth> health = look_at_experts(training.stage().weights(), training.mesh(), &recipe, &read).layers;
    expect_same(health, brute_force(training.stage().weights(), training.mesh(), &recipe, &read, at::kBFloat16));
  }
}

TEST(ExpertHealth, AZeroExpertAndASourceThatIsGone) {
  const Architecture dense = dense_model();
  const ReadDense read = dense_reader(dense);
  ParallelSection parallel;
  parallel.expert = world_size();
  const RunConfig run = run_of(8, 2, parallel, Precision::fp32);
  const Recipe recipe = make_recipe(dense, run);
  Grown grown(run, recipe, read, [](const ParameterSpec&, int64_t e, Tensor values) { if (e == 3) values.zero_(); });
  const ReadDense gone([&](const std::string& name, const Box& box) -> Tensor {
    if (world_rank() == world_size() - 1) fail("the disk of the last rank is gone");
    return read(name, box);
  });
  const auto [health, trouble] = look_at_experts(grown.stage.weights(), grown.mesh, &recipe, &gone);
  EXPECT_EQ(trouble, "the disk of the last rank is gone");
  ASSERT_EQ(health.size(), 3u);
  for (const LayerHealth& layer : health) {
    EXPECT_TRUE(layer.distance.empty());
    // Copies of shard 1: of 6 pairs the 3 with expert 3 count as 0.
    EXPECT_NEAR(layer.cosine_between, (1.0 + 0.5) / 2, kBound);
  }
  const ExpertHealth again = look_at_experts(grown.stage.weights(), grown.mesh, &recipe, &read);
  EXPECT_EQ(again.trouble, "");
  EXPECT_NEAR(again.layers[0].distance[3], 1.0, kBound);
}

}  // namespace
}  // namespace upcycle
