// [train] deterministic = true: the same steps twice, bit for bit.
#include <ATen/ops/scalar_tensor.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/device.hpp"
#include "support/tiny_training.hpp"

namespace upcycle {
namespace {

/// All weights after some steps of a model of its own, and each step's loss and norm.
std::vector<Tensor> after_steps(int64_t experts, Recompute recompute) {
  TinyModel model;
  model.seed = 5, model.weights = wide_weights(5);
  Architecture& a = model.architecture;
  a.hidden = 256, a.layers = 2, a.heads = 4, a.kv_heads = 2, a.head_dim = 64, a.ffn = 512, a.vocab = 1000, a.tied = true;
  if (experts > 0) a.experts = experts, a.top_k = 2, a.expert_ffn = 128, a.dense_layers = {1};
  RunConfig& run = model.run;
  run.train.steps = 20, run.train.sequence = 640, run.train.global_batch = 6, run.train.micro_batch = 3, run.train.recompute = recompute;
  run.optimizer.lr = 1e-3, run.optimizer.schedule = Schedule::constant;
  run.balance.aux = 0.05, run.balance.z = 0.01;
  run.parallel.zero = 0;
  TinyTraining training(model, run, at::Device(at::kCUDA, 0), Transport::mpi);
  std::vector<Tensor> results;
  for (int step = 0; step < 3; ++step) {
    const StepReport report = training.step();
    results.push_back(at::scalar_tensor(report.loss, at::kDouble));
    results.push_back(at::scalar_tensor(report.gradient_norm, at::kDouble));
  }
  for (const Weight& weight : training.stage().weights().all()) results.push_back(weight.parameter.value.cpu());
  for (const Bucket& bucket : training.stage().weights().buckets()) results.push_back(bucket.masters.cpu());
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
