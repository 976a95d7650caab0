// A training step on a GPU: in bf16 nothing in it makes the host wait, in fp32 it is the CPU's step.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"
#include "support/tiny_training.hpp"

namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);

/// A model in training on one device. Layer 1 is dense when there are experts.
TinyTraining train(int64_t experts, Precision precision, at::Device device, int64_t head_dim = 16, BalanceScope scope = BalanceScope::batch) {
  TinyModel model;
  model.seed = 5, model.weights = wide_weights(5);
  Architecture& a = model.architecture;
  a.hidden = 32, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = head_dim, a.ffn = 48, a.vocab = 96, a.tied = true;
  if (experts > 0) a.experts = experts, a.top_k = 2, a.expert_ffn = 24, a.dense_layers = {1};
  RunConfig& run = model.run;
  run.train.steps = 20, run.train.sequence = 16, run.train.global_batch = 8, run.train.micro_batch = 4, run.train.precision = precision;
  run.optimizer.lr = 1e-3, run.optimizer.schedule = Schedule::constant;
  run.balance.aux = 0.05, run.balance.z = 0.01, run.balance.scope = scope;
  run.balance.bias_rate = 1e-3, run.balance.jitter = 0.01;
  run.parallel.zero = 0;
  return TinyTraining(model, run, device, Transport::mpi);
}

TEST(StepOnGpu, NeverMakesTheHostWait) {
  for (const auto& [experts, scope] : {std::pair{0, BalanceScope::batch}, {8, BalanceScope::batch}, {8, BalanceScope::sequence},
                                       {8, BalanceScope::global}}) {
    SCOPED_TRACE(text(experts, " experts, scope ", static_cast<int>(scope)));
    TinyTraining training = train(experts, Precision::bf16, kGpu, 16, scope);
    training.step();   // the table of rotations travels once
    PendingReport pending;
    {
      const NoWaiting guard;
      for (int step = 0; step < 3; ++step) pending = training.trainer().step();
    }
    EXPECT_LT(read(pending).loss, 20.0);
  }
}

// fp32 experts go one by one: the host must know their rows. This shows that NoWaiting sees what it should.
TEST(StepOnGpu, Fp32ExpertsDoMakeItWait) {
  TinyTraining training = train(8, Precision::fp32, kGpu);
  const NoWaiting guard;
  EXPECT_ANY_THROW(training.trainer().step());
}

TEST(StepOnGpu, IsTheCpusInFp32AndNearItInBf16) {
  for (const auto& [experts, head_dim] : {std::pair{0, 16}, {8, 16}, {8, 10}}) {   // no flash kernel takes heads of 10
    SCOPED_TRACE(text(experts, " experts, heads of ", head_dim));
    TinyTraining cpu = train(experts, Precision::fp32, at::kCPU, head_dim), gpu = train(experts, Precision::fp32, kGpu, head_dim);
    TinyTraining half = train(experts, Precision::bf16, kGpu, head_dim);
    for (int step = 0; step < 5; ++step) {
      const StepReport a = cpu.step(), b = gpu.step(), c = half.step();
      EXPECT_LE(std::abs(b.loss / a.loss - 1), 1e-6);
      EXPECT_LE(std::abs(b.gradient_norm / a.gradient_norm - 1), 1e-5);
      EXPECT_EQ(b.tokens_per_expert, a.tokens_per_expert);
      EXPECT_LE(std::abs(c.loss / a.loss - 1), 1e-2);
    }
  }
}

TEST(StepOnGpu, AHostCopyWaitsForItselfAlone) {
  const Tensor x = normal({1000}, 1), there = device::send(x, kGpu);
  const Tensor big = at::full({8192, 8192}, 1e-4, there.options());
  Tensor out = at::empty_like(big);
  at::mm_out(out, big, big);
  device::synchronize(kGpu);
  const device::HostCopy copy(there * 2);
  for (int i = 0; i < 20; ++i) at::mm_out(out, big, big);   // 20 TFLOP in fp32: tenths of a second
  c10::Event after(at::kCUDA);
  after.record(c10::cuda::getCurrentCUDAStream(0));
  EXPECT_TRUE(copy.wait().equal(x * 2));
  EXPECT_FALSE(after.query()) << "it waited for what came behind it, too";
  device::synchronize(kGpu);
}

}  // namespace
}  // namespace upcycle
