// Gradients summed and values handed out over NCCL beside the computation, on as many ranks as the test is started with, with and
// without ZeRO-1: the CPU's training in fp32, and no wait of the host in bf16. Where ranks share a GPU, NCCL is made to believe in
// different hosts.
#include "train/replicas.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.hpp"
#include "device/device.hpp"
#include "support/hosts_of_their_own.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"
#include "support/tiny_training.hpp"

namespace upcycle {
namespace {

TinyTraining train(Precision precision, at::Device device, Transport transport, int64_t zero) {
  TinyModel model;
  Architecture& a = model.architecture;
  a.hidden = 64, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 96, a.vocab = 128, a.tied = true;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 32, a.dense_layers = {1};
  model.seed = 5, model.weights = random(a, 5);
  RunConfig& run = model.run;
  run.train.steps = 20, run.train.sequence = 16, run.train.global_batch = 16, run.train.micro_batch = 2, run.train.precision = precision;
  run.optimizer.lr = 1e-3, run.optimizer.schedule = Schedule::constant;
  run.balance.aux = 0.05;
  run.parallel.zero = zero;
  return TinyTraining(model, run, device, transport);
}

class Beside : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    if (device::count() == 0) GTEST_SKIP() << "no GPU here";
    gpu = device::choose("cuda", host_rank());
    hosts_of_their_own();
    bucket_elements = 10000;
  }
  void TearDown() override { bucket_elements = int64_t{1} << 25; }
  at::Device gpu = at::kCPU;
};
INSTANTIATE_TEST_SUITE_P(Zero, Beside, testing::Values(0, 1));

TEST_P(Beside, IsTheCpusTraining) {
  TinyTraining cpu = train(Precision::fp32, at::kCPU, Transport::mpi, 0), nccl = train(Precision::fp32, gpu, Transport::nccl, GetParam());
  TinyTraining host = train(Precision::fp32, gpu, Transport::mpi, GetParam());
  ASSERT_GT(nccl.stage().weights().buckets().size(), 4U);
  for (int step = 0; step < 6; ++step) {
    const StepReport a = cpu.step(), b = nccl.step(), c = host.step();
    EXPECT_LE(std::abs(b.loss / a.loss - 1), 1e-6) << step;
    EXPECT_LE(std::abs(b.gradient_norm / a.gradient_norm - 1), 1e-5) << step;
    EXPECT_LE(std::abs(c.loss / a.loss - 1), 1e-6) << step << ", through host memory";
    EXPECT_LE(std::abs(c.gradient_norm / a.gradient_norm - 1), 1e-5) << step << ", through host memory";
  }
  for (size_t i = 0; i < cpu.stage().weights().all().size(); ++i) {
    const Weight &a = cpu.stage().weights().all()[i], &b = nccl.stage().weights().all()[i];
    EXPECT_LE(distance(b.parameter.arrived().cpu(), a.parameter.arrived()), 1e-4) << a.spec().name;
  }
}

TEST_P(Beside, NeverMakesTheHostWait) {
  TinyTraining training = train(Precision::bf16, gpu, Transport::nccl, GetParam());
  for (int step = 0; step < 2; ++step) training.step();   // connections are made, additions are counted
  PendingReport pending;
  {
    const NoWaiting guard;
    for (int step = 0; step < 3; ++step) pending = training.trainer().step();
  }
  EXPECT_LT(read(pending).loss, 20.0);
}

}  // namespace
}  // namespace upcycle
