// An exactly upcycled model is the dense model: as functions, on the same tokens, in fp32.
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "base/error.hpp"
#include "golden/model.hpp"
#include "upcycle/recipe.hpp"
#include "upcycle/units.hpp"

namespace upcycle {
namespace {

Architecture small_dense(at::ScalarType dtype) {
  Architecture a;
  a.hidden = 96, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 32, a.ffn = 256, a.vocab = 211;
  a.dtype = dtype;
  return a;
}

/// Weights with the spread of a real model: matrices keep the size of what they multiply, so gates neither vanish nor saturate.
class DenseWeights {
 public:
  explicit DenseWeights(const Architecture& architecture) {
    uint64_t seed = 1;
    for (const ParameterSpec& spec : catalogue(architecture)) {
      const Tensor draw = normal(spec.shape, seed++);
      const bool matrix = spec.shape.size() == 2 && spec.role != Role::embedding;
      const Tensor value = matrix ? draw / std::sqrt(static_cast<double>(spec.shape[1])) : spec.role == Role::norm ? 1 + 0.2 * draw : draw;
      tensors_[spec.name] = value.to(architecture.dtype);
    }
  }
  ReadDense read() const {
    return [this](const std::string& name, const Box& box) {
      Tensor x = tensors_.at(name);
      for (size_t d = 0; d < box.begin.size(); ++d) x = x.narrow(static_cast<int64_t>(d), box.begin[d], box.size[d]);
      return x;
    };
  }

 private:
  std::map<std::string, Tensor> tensors_;
};

struct Form {
  int64_t experts, granularity, top_k;
};

RunConfig run_of(const Form& form, Scaling scaling) {
  RunConfig run;
  run.moe_given = true;
  run.moe.experts = form.experts, run.moe.granularity = form.granularity, run.moe.top_k = form.top_k;
  run.upcycle.scaling = scaling;
  return run;
}

/// ||upcycled - dense|| / ||dense|| over the logits of 96 tokens.
double error_of(const RunConfig& run, at::ScalarType dtype = at::kFloat) {
  const Architecture dense = small_dense(dtype);
  const DenseWeights weights(dense);
  Recipe recipe = make_recipe(dense, run);
  for (int64_t layer = 0; layer < dense.layers; ++layer) {
    if (recipe.permutation == UnitOrder::clusters) recipe.clusters[layer] = cluster_units(recipe, layer, weights.read());
  }
  Model before(dense, as_they_are(weights.read())), after(recipe.moe, grown(recipe, weights.read()));
  const Tensor ids = at::randint(dense.vocab, {4, 24}, at::detail::createCPUGenerator(5), at::TensorOptions(at::kLong));
  return distance(after.logits(ids), before.logits(ids));
}

class Exactness : public testing::TestWithParam<Form> {};

TEST_P(Exactness, UpcycledIsDense) {
  EXPECT_LE(error_of(run_of(GetParam(), Scaling::exact)), 1e-5);
  EXPECT_LE(error_of(run_of(GetParam(), Scaling::exact), at::kBFloat16), 1e-5) << "from bf16 weights, with a router in bf16";
}

TEST_P(Exactness, InAnyOrderOfHiddenUnits) {
  for (const auto order : {UnitOrder::random, UnitOrder::clusters}) {
    RunConfig run = run_of(GetParam(), Scaling::exact);
    run.upcycle.permutation = order;
    EXPECT_LE(error_of(run), 1e-5);
    EXPECT_LE(error_of(run, at::kBFloat16), 1e-5);
  }
}

TEST_P(Exactness, AndNotByChance) {
  const auto [experts, granularity, top_k] = GetParam();
  if (granularity == 1) {
    // Plain copies: nothing to scale. A router that does not renormalise shows that the weights matter.
    RunConfig run = run_of(GetParam(), Scaling::none);
    run.moe.pre_softmax = true;
    EXPECT_GT(error_of(run), 0.05);
  } else {
    EXPECT_GT(error_of(run_of(GetParam(), Scaling::none)), 0.05);
    const double cube_root = error_of(run_of(GetParam(), Scaling::cube_root));
    RecordProperty("cube_root_error", std::to_string(cube_root));
    EXPECT_GT(cube_root, granularity == 8 ? 0.05 : 0.02);
  }
}

INSTANTIATE_TEST_SUITE_P(ExpertsGranularityTopK, Exactness,
                         testing::Values(Form{8, 1, 2}, Form{4, 1, 1}, Form{64, 8, 8}, Form{64, 8, 16}, Form{8, 2, 4}, Form{64, 4, 8}),
                         [](const auto& info) {
                           return text("N", info.param.experts, "G", info.param.granularity, "K", info.param.top_k);
                         });

TEST(Exactness, SomeLayersStayDense) {
  RunConfig run = run_of({8, 2, 4}, Scaling::exact);
  run.moe.layers_text = "every:2";
  EXPECT_LE(error_of(run), 1e-5);
  run.moe.layers_text = "first-dense:1";
  EXPECT_LE(error_of(run), 1e-5);
}

}  // namespace
}  // namespace upcycle
