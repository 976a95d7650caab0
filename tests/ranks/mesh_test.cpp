#include "parallel/mesh.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

constexpr Axis kAll[] = {Axis::tensor,        Axis::context, Axis::data,        Axis::pipeline,
                         Axis::expert_tensor, Axis::expert,  Axis::expert_data, Axis::replica};

/// Layouts that this number of ranks allows.
std::vector<ParallelSection> layouts() {
  std::vector<ParallelSection> fitting;
  for (const int64_t tensor : {1, 2}) {
    for (const int64_t context : {1, 2}) {
      for (const int64_t pipeline : {1, 2}) {
        for (const int64_t expert : {1, 2, 4}) {
          ParallelSection section;
          section.tensor = tensor;
          section.context = context;
          section.pipeline = pipeline;
          section.expert = expert;
          try {
            Grid(section, world_size());
            fitting.push_back(section);
          } catch (const UserError&) {
          }
        }
      }
    }
  }
  return fitting;
}

TEST(Mesh, CommunicatorsAreTheGridsPeers) {
  for (const ParallelSection& section : layouts()) {
    const Mesh mesh(Grid(section, world_size()));
    EXPECT_EQ(mesh.world().size(), world_size());
    EXPECT_EQ(mesh.world().rank(), world_rank());
    for (const Axis axis : kAll) {
      const Communicator& group = mesh.along(axis);
      ASSERT_EQ(group.size(), mesh.grid().size(axis)) << name(axis);
      EXPECT_EQ(group.rank(), mesh.here()[axis]) << name(axis);
      std::vector<int64_t> members = group.all_gather(int64_t{world_rank()});
      const std::vector<int> peers = mesh.grid().peers(axis, world_rank());
      EXPECT_EQ(members, std::vector<int64_t>(peers.begin(), peers.end())) << name(axis);
    }
  }
}

TEST(Mesh, SumsOverEveryAxis) {
  ParallelSection section;
  section.expert = world_size();
  Mesh mesh(Grid(section, world_size()));
  mesh.prepare(c10::Device(c10::kCPU), Transport::automatic);
  EXPECT_EQ(mesh.transport(), "MPI");
  Tensor x = at::full({3}, world_rank() + 1.0);
  mesh.along(Axis::data).all_reduce(x);
  EXPECT_TRUE(at::equal(x, at::full({3}, world_size() * (world_size() + 1) / 2.0)));
  Tensor alone = at::full({3}, 2.0);
  mesh.along(Axis::expert_data).all_reduce(alone);
  EXPECT_TRUE(at::equal(alone, at::full({3}, 2.0)));
}

TEST(Mesh, NcclNeedsAGpu) {
  Mesh mesh(Grid(ParallelSection{}, world_size()));
  EXPECT_THROW(mesh.prepare(c10::Device(c10::kCPU), Transport::nccl), UserError);
  mesh.prepare(c10::Device(c10::kCPU), Transport::mpi);
  EXPECT_EQ(mesh.transport(), "MPI");
}

TEST(Mesh, WithoutNcclAutomaticFallsBackToHostMemory) {
  if (device::cuda_built_in()) GTEST_SKIP() << "this build has NCCL; tests/gpu covers it";
  Mesh mesh(Grid(ParallelSection{}, world_size()));
  const c10::Device gpu(c10::kCUDA, 0);
  mesh.prepare(gpu, Transport::automatic);
  EXPECT_EQ(mesh.transport(), "MPI through pinned host memory");
  EXPECT_FALSE(mesh.world().has_nccl());
  try {
    mesh.prepare(gpu, Transport::nccl);
    ADD_FAILURE() << "accepted";
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(), "run.transport = \"nccl\", but NCCL is not built in; use \"auto\" or \"mpi\"");
  }
  if (world_size() > 1) {
    Communicator world = Communicator::everyone();
    EXPECT_THROW(world.use_nccl(), std::runtime_error);
  }
}

TEST(Mesh, RefusesAGridOfAnotherSize) {
  EXPECT_THROW(Mesh(Grid(ParallelSection{}, world_size() + 1)), std::logic_error);
}

TEST(Mesh, KnowsWhereItRuns) {
  EXPECT_EQ(host_rank(), world_rank()) << "all ranks of this test share a host";
  const std::vector<std::string> transports = transports_built_in();
  ASSERT_FALSE(transports.empty());
  EXPECT_EQ(transports[0].find("MPI ("), 0u) << transports[0];
  EXPECT_EQ(transports.size(), device::cuda_built_in() ? 2u : 1u);
}

}  // namespace
}  // namespace upcycle
