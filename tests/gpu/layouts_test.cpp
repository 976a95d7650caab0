// Every axis alone and every pair of axes, on as many ranks as the test is started with, over NCCL and over MPI through host memory:
// one rank's losses, gradient norms and parameters, in fp32 on the GPU. Ranks that share a GPU are made to look like different hosts
// to NCCL. The run on one rank leaves its numbers in the build tree for the others (a CTest fixture).
#include <gtest/gtest.h>

#include <bitset>
#include <chrono>
#include <iostream>
#include <map>

#include "device/device.hpp"
#include "parallel/every_layout.hpp"
#include "support/hosts_of_their_own.hpp"
#include "support/reference.hpp"

namespace upcycle {
namespace {

class LayoutsOnGpu : public testing::TestWithParam<Transport> {
 protected:
  static void SetUpTestSuite() {
    if (device::count() == 0 || world_size() <= device::count()) return;
    hosts_of_their_own();
  }
};

/// Which axes have more than one rank: those that were asked for, and data, which is what remains.
std::bitset<6> axes_of(const ParallelSection& p) {
  const int64_t data = world_size() / (p.tensor * p.context * p.pipeline);
  std::bitset<6> axes;
  axes[0] = p.tensor > 1, axes[1] = p.context > 1, axes[2] = p.pipeline > 1, axes[3] = p.expert > 1, axes[4] = p.expert_tensor > 1;
  axes[5] = data > 1 && p.expert == 1 && p.expert_tensor == 1;
  return axes;
}

/// Every axis alone and every pair. (Experts that span tensor or context ranks are a pair by themselves, a pipeline of them a triple.) All
/// layouts of them; but where 4 ranks take turns at one GPU, which makes each collective last milliseconds, one of each set of axes: over MPI
/// that of the fewest ranks an axis and no ZeRO, over NCCL that of the most with it.
std::vector<ParallelSection> layouts_over(Transport transport) {
  std::vector<ParallelSection> chosen;
  std::map<std::string, ParallelSection> of_set;
  const bool all = world_size() <= 2 || world_size() <= device::count();
  for (const ParallelSection& layout : every_layout(world_size())) {
    const std::bitset<6> axes = axes_of(layout);
    if (axes.count() > 2) continue;
    if (all) {
      chosen.push_back(layout);
    } else if (transport == Transport::nccl) {
      of_set.insert_or_assign(axes.to_string(), layout);
    } else {
      of_set.try_emplace(axes.to_string(), layout);
    }
  }
  for (const auto& [axes, layout] : of_set) chosen.push_back(layout);
  return chosen;
}

TEST_P(LayoutsOnGpu, TrainTheSameModel) {
  if (device::count() == 0) GTEST_SKIP() << "no GPU here";
  const at::Device gpu = device::choose("cuda", host_rank());
  device::set_tf32(false);
  const References references(gpu);
  size_t ran = 0;
  for (const ParallelSection& layout : layouts_over(GetParam())) {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<TinyModel> models = models_for(layout);
    const size_t which = ran % models.size();
    RunConfig run = models[which].run;
    run.parallel = layout;
    run.train.recompute = std::array{Recompute::none, Recompute::selective, Recompute::full}[ran % 3];
    SCOPED_TRACE(text(models[which].name, ", ", describe(layout), ", recompute ", static_cast<int>(run.train.recompute)));
    expect_same(models[which], run, references.of(models[which]), 1e-6, gpu, GetParam());
    ++ran;
    if (world_rank() == 0) {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      std::cout << text(models[which].name, ": ", describe(layout), ": ", std::round(seconds.count() * 100) / 100, " s\n") << std::flush;
    }
  }
  EXPECT_GE(ran, world_size() == 1 ? 1U : world_size() == 2 ? 6U : 19U);
}

INSTANTIATE_TEST_SUITE_P(Transports, LayoutsOnGpu, testing::Values(Transport::nccl, Transport::mpi), [](const auto& transport) {
  return std::string(transport.param == Transport::nccl ? "nccl" : "mpi");
});

}  // namespace
}  // namespace upcycle
