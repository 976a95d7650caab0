// The look at experts whose weights are on GPUs is that of the same weights on the CPU, on as many ranks as the test is started with,
// over NCCL and over MPI through host memory. Ranks that share a GPU are made to look like different hosts to NCCL.
#include "train/expert_health.hpp"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/device.hpp"
#include "support/hosts_of_their_own.hpp"
#include "support/tiny_training.hpp"

namespace upcycle {
namespace {

class ExpertHealthOnGpu : public testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    if (device::count() == 0) GTEST_SKIP() << "no GPU here";
    gpu = device::choose("cuda", host_rank());
    if (world_size() <= device::count()) return;
    hosts_of_their_own();
  }
  void TearDown() override { health_piece_elements = int64_t{1} << 22; }
  at::Device gpu = at::kCPU;
};
INSTANTIATE_TEST_SUITE_P(Transports, ExpertHealthOnGpu, testing::Values(Transport::nccl, Transport::mpi));

void expect_near(double ours, double theirs) {
  EXPECT_TRUE((std::isnan(ours) && std::isnan(theirs)) || std::abs(ours - theirs) <= 1e-6) << ours << " on the GPU, " << theirs << " on the CPU";
}

// The granular model in training, in bf16 with divided masters, and a dense model that no file holds.
TEST_P(ExpertHealthOnGpu, IsTheCpus) {
  const TinyModel model = tiny_models(4)[2];
  Recipe recipe;
  recipe.moe = model.architecture;
  recipe.granularity = 4, recipe.copies = 4, recipe.up_factor = 2, recipe.down_factor = 2;
  Architecture dense = dense_form(model.architecture);
  dense.ffn = 64;
  recipe.source = dense;
  const ReadDense read([&](const std::string& name, const Box& box) {
    const Tensor x = at::empty(box.size, at::kFloat);
    initialise(find(catalogue(dense), name), box, dense, 5, x);
    return x.to(at::kBFloat16);
  });
  RunConfig run = model.run;
  run.train.precision = Precision::bf16;
  run.parallel.zero = 1;
  run.parallel.expert = world_size() % 2 == 0 ? 2 : 1;
  TinyTraining on_gpu(model, run, gpu, GetParam()), on_cpu(model, run);
  on_gpu.step();
  on_gpu.step();
  for (const int64_t piece : {int64_t{1} << 22, int64_t{300}}) {
    health_piece_elements = piece;
    const auto [ours, trouble] = look_at_experts(on_gpu.stage().weights(), on_gpu.mesh(), &recipe, &read);
    EXPECT_EQ(trouble, "");
    const Unrecorded guard;
    for (size_t i = 0; i < on_cpu.stage().weights().all().size(); ++i) {
      on_cpu.stage().weights().all()[i].parameter.value.copy_(on_gpu.stage().weights().all()[i].parameter.arrived());
    }
    const std::vector<LayerHealth> theirs = look_at_experts(on_cpu.stage().weights(), on_cpu.mesh(), &recipe, &read).layers;
    ASSERT_EQ(ours.size(), 4u);
    for (size_t layer = 0; layer < ours.size(); ++layer) {
      expect_near(ours[layer].cosine, theirs[layer].cosine);
      expect_near(ours[layer].cosine_between, theirs[layer].cosine_between);
      expect_near(ours[layer].cosine_inside, theirs[layer].cosine_inside);
      ASSERT_EQ(ours[layer].distance.size(), 16u);
      for (size_t e = 0; e < 16; ++e) expect_near(ours[layer].distance[e], theirs[layer].distance[e]);
      EXPECT_GT(ours[layer].distance[0], 0.1);
    }
  }
}

}  // namespace
}  // namespace upcycle
