// Our model against Hugging Face transformers on the tiny models of make_golden.py: logits, loss, every gradient, 20 AdamW steps.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "golden/model.hpp"
#include "train/dense_source.hpp"
#include "train/optimizer.hpp"

namespace upcycle {
namespace {

const std::filesystem::path kGolden = UPCYCLE_GOLDEN_DIR;

/// Our parameters' slices by their names: `of` picks value, master or gradient.
template <class Of>
std::map<std::string, Tensor> by_name(Weights& weights, Of of) {
  std::map<std::string, Tensor> out;
  for (Weight& weight : weights.all()) {
    for (const Part& part : weight.parts) out[part.spec.name] = part.of(of(weight.parameter));
  }
  return out;
}

class Golden : public testing::TestWithParam<const char*> {
 protected:
  Golden()
      : source(kGolden / GetParam() / "model"),
        golden(kGolden / GetParam() / "golden.safetensors"),
        ids(golden.read("ids")),
        model(source.architecture(), as_they_are([this](const std::string& name, const Box& box) { return source.read(name, box); })) {
    source.check();
  }

  WeightSource source;
  SafetensorsReader golden;
  Tensor ids;  ///< [batches, B, S+1]
  Model model;
};

TEST_P(Golden, Logits) {
  const Tensor ours = model.logits(ids[0].narrow(1, 0, ids.size(2) - 1)), theirs = golden.read("logits");
  EXPECT_LE(distance(ours, theirs), 1e-5);
  EXPECT_GT(theirs.std().item<double>(), 0.5) << "a model whose logits say nothing proves nothing";
}

TEST_P(Golden, LossAndEveryGradient) {
  const Tensor loss = model.loss(ids[0]);
  const double expected = golden.read("loss.mean").item<double>();
  EXPECT_NEAR(loss.item<double>(), expected, 1e-5 * expected);
  torch::autograd::backward({loss}, {});

  const auto gradients = by_name(model.weights(), [](Parameter& p) { return p.main_grad; });
  size_t compared = 0;
  for (const auto& [name, entry] : golden.entries()) {
    const std::string prefix = "gradient.";
    if (!name.starts_with(prefix)) continue;
    const std::string ours = name.substr(prefix.size());
    ASSERT_TRUE(gradients.contains(ours)) << ours;
    const Tensor theirs = golden.read(name);
    EXPECT_GT(theirs.norm().item<double>(), 0.0) << ours;
    EXPECT_LE(distance(gradients.at(ours), theirs), 1e-4) << ours;
    ++compared;
  }
  EXPECT_EQ(compared, gradients.size());
}

TEST_P(Golden, LossesOfTwentySteps) {
  const Tensor theirs = golden.read("losses");
  OptimizerSection settings;
  settings.weight_decay = 0.1, settings.betas = {0.9, 0.95}, settings.eps = 1e-6, settings.clip = 1.0;
  Optimizer optimizer(model.weights(), settings, /*router_lr_scale=*/1.0);
  ASSERT_EQ(theirs.size(0), 20);
  for (int64_t step = 0; step < theirs.size(0); ++step) {
    const Tensor loss = model.loss(ids[step % ids.size(0)]);
    torch::autograd::backward({loss}, {});
    optimizer.step(/*lr=*/1e-3, optimizer.squared_norm_share());
    optimizer.zero_gradients();
    const double expected = theirs[step].item<double>();
    EXPECT_NEAR(loss.item<double>(), expected, 1e-5 * expected) << "step " << step;
  }
  EXPECT_LT(theirs[19].item<double>(), 0.9 * theirs[0].item<double>()) << "nothing was learnt";
}

// Routers that choose by a hair's breadth would choose otherwise on another machine.
TEST_P(Golden, RoutersChooseClearly) { EXPECT_GT(golden.read("gap").item<double>(), 1e-4); }

INSTANTIATE_TEST_SUITE_P(Cases, Golden,
                         testing::Values("dense_gqa1_fp32", "dense_gqa2_tied_bf16_sharded", "dense_gqa8_fp16", "dense_gqa2_tied_fp32",
                                         "moe_renormalised_fp32", "moe_plain_bf16_sharded", "moe_mixed_sparse_step_fp16",
                                         "moe_mixed_dense_first"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace upcycle
