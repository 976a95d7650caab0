// [train] deterministic = true: the same steps twice, bit for bit.
#include <ATen/ops/scalar_tensor.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.hpp"
#include "base/rng.hpp"
#include "device/device.hpp"
#include "support/numbers.hpp"
#include "train/start.hpp"
#include "train/trainer.hpp"

namespace upcycle {
namespace {

/// All weights after some steps of a model of its own, and each step's loss and norm.
std::vector<Tensor> after_steps(int64_t experts, Recompute recompute) {
  Architecture a;
  a.hidden = 256, a.layers = 2, a.heads = 4, a.kv_heads = 2, a.head_dim = 64, a.ffn = 512, a.vocab = 1000, a.tied = true;
  if (experts > 0) a.experts = experts, a.top_k = 2, a.expert_ffn = 128, a.dense_layers = {1};
  RunConfig run;
  run.train.steps = 20, run.train.sequence = 640, run.train.global_batch = 6, run.train.micro_batch = 3, run.train.recompute = recompute;
  run.optimizer.lr = 1e-3, run.optimizer.schedule = Schedule::constant;
  run.balance.aux = 0.05, run.balance.z = 0.01;
  Mesh mesh{Grid(ParallelSection{}, 1)};
  Stage stage(a, Layout::even(mesh.grid(), a), mesh);
  stage.weights().allocate(at::kBFloat16, at::Device(at::kCUDA, 0));
  fill_masters(stage.weights(), [](const ParameterSpec& spec, const Box&, Tensor target) {
    const Tensor x = normal(spec.shape, Random(5, spec.name).bits(0));
    target.copy_(spec.role == Role::norm ? 1 + 0.2 * x : x * (2 / std::sqrt(static_cast<double>(spec.shape.back()))));
  });
  Optimizer optimizer(stage.weights(), run.optimizer, /*router_lr_scale=*/1.0);
  const Sampler sampler(std::vector<Blend>{{1.0, "mock"}}, {1, 0, 0}, Split::train, run.train.sequence, a.vocab, 5);
  Trainer trainer(run, mesh, stage, optimizer, sampler);
  std::vector<Tensor> results;
  for (int step = 0; step < 3; ++step) {
    const StepReport report = read(trainer.step());
    results.push_back(at::scalar_tensor(report.loss, at::kDouble));
    results.push_back(at::scalar_tensor(report.gradient_norm, at::kDouble));
  }
  for (const Weight& weight : stage.weights().all()) results.push_back(weight.parameter.value.cpu());
  for (const Bucket& bucket : stage.weights().buckets()) results.push_back(bucket.masters.cpu());
  return results;
}

TEST(Deterministic, StepsAreTheSameBits) {
  device::set_deterministic(true);
  for (const auto& [experts, recompute] : {std::pair{0, Recompute::none}, {8, Recompute::none}, {8, Recompute::full}}) {
    SCOPED_TRACE(text(experts, " experts, recompute ", static_cast<int>(recompute)));
    const std::vector<Tensor> first = after_steps(experts, recompute);
    for (int time = 0; time < 3; ++time) {
      const std::vector<Tensor> again = after_steps(experts, recompute);
      ASSERT_EQ(again.size(), first.size());
      for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(again[i].equal(first[i])) << "result " << i;
    }
  }
  device::set_deterministic(false);
}

}  // namespace
}  // namespace upcycle
