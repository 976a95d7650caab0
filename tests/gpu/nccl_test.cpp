#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/device.hpp"
#include "parallel/gpu_sharing.hpp"
#include "parallel/mesh.hpp"
#include "parallel/regions.hpp"
#include "support/hosts_of_their_own.hpp"

// NCCL against MPI through host memory, on CUDA tensors, on as many ranks as the test is started with. Where they share
// a GPU NCCL is made to believe in different hosts (NCCL_HOSTID), which it reads once: so the refusal is tested first.
namespace upcycle {
namespace {

class Nccl : public testing::TestWithParam<at::ScalarType> {
 protected:
  static void SetUpTestSuite() {
    if (device::count() == 0) return;
    gpu = device::choose("cuda", host_rank());
    hosts_of_their_own();
    ParallelSection section;
    section.expert = world_size();
    mesh = new Mesh(Grid(section, world_size()));
    mesh->prepare(gpu, Transport::nccl);
    mpi = new Communicator(Communicator::everyone());
  }
  static void TearDownTestSuite() {
    delete mpi;
    delete mesh;
    mpi = nullptr;
    mesh = nullptr;
  }
  void SetUp() override {
    if (device::count() == 0) GTEST_SKIP() << "no GPU here";
    ASSERT_EQ(mesh->along(Axis::data).has_nccl(), size > 1);
    ASSERT_FALSE(mpi->has_nccl());
  }

  /// Whole numbers: sums are exact in fp32, whatever the order, so that both transports must give the same bits.
  Tensor held(at::IntArrayRef sizes, uint64_t seed = 0) const {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed * 100 + static_cast<uint64_t>(rank));
    return at::randn(sizes, generator, at::TensorOptions(at::kFloat)).mul_(50).round_().to(dtype()).to(gpu);
  }
  at::ScalarType dtype() const { return GetParam(); }
  const Communicator& nccl() const { return mesh->along(Axis::data); }

  static inline c10::Device gpu{c10::kCPU};
  static inline Mesh* mesh = nullptr;
  static inline Communicator* mpi = nullptr;
  const int rank = world_rank(), size = world_size();
};
INSTANTIATE_TEST_SUITE_P(Dtypes, Nccl, testing::Values(at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kInt, at::kLong),
                         [](const auto& dtype) { return std::string(c10::toString(dtype.param)); });

TEST(BeforeNccl, RanksOnOneGpuGetMpiAndAreTold) {
  if (device::count() == 0) GTEST_SKIP() << "no GPU here";
  if (world_size() <= device::count()) GTEST_SKIP() << "every rank has its own GPU";
  const c10::Device gpu = device::choose("auto", host_rank());
  Mesh mesh(Grid(ParallelSection{}, world_size()));
  mesh.prepare(gpu, Transport::automatic);
  EXPECT_EQ(mesh.transport(), "MPI through pinned host memory");
  EXPECT_FALSE(mesh.world().has_nccl());
  try {
    mesh.prepare(gpu, Transport::nccl);
    ADD_FAILURE() << "accepted";
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("ranks 0"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(" share one GPU (GPU-"), std::string::npos) << error.what();
  }
  EXPECT_THROW(refuse_shared_gpus(mesh.world(), gpu), UserError);
  refuse_shared_gpus(mesh.world(), c10::Device(c10::kCPU));
}

TEST_P(Nccl, AllReduce) {
  for (const Reduce how : {Reduce::sum, Reduce::max, Reduce::min}) {
    for (const int64_t count : {1, 1001, 300001}) {
      Tensor by_nccl = held({count}), by_mpi = by_nccl.clone();
      nccl().all_reduce(by_nccl, how);
      mpi->all_reduce(by_mpi, how);
      EXPECT_TRUE(at::equal(by_nccl, by_mpi));
    }
  }
}

TEST_P(Nccl, AllGather) {
  const Tensor x = held({3, 5, 7});
  for (const int64_t dim : {0, 1, 2}) EXPECT_TRUE(at::equal(nccl().all_gather(x, dim), mpi->all_gather(x, dim)));
}

TEST_P(Nccl, ReduceScatter) {
  const Tensor x = held({3 * size, 5, size});
  for (const int64_t dim : {0, 2}) EXPECT_TRUE(at::equal(nccl().reduce_scatter(x, dim), mpi->reduce_scatter(x, dim)));
}

TEST_P(Nccl, InPlaceReduceScatterAndAllGather) {
  for (const int64_t part : {1, 1001, 65536}) {
    Tensor by_nccl = held({part * size}), by_mpi = by_nccl.clone();
    if (dtype() == at::kFloat) {   // what is summed in place are gradients
      nccl().reduce_into_own_part(by_nccl);
      mpi->reduce_into_own_part(by_mpi);
      EXPECT_TRUE(at::equal(by_nccl.narrow(0, rank * part, part), by_mpi.narrow(0, rank * part, part)));
    }
    nccl().gather_from_own_part(by_nccl);
    mpi->gather_from_own_part(by_mpi);
    EXPECT_TRUE(at::equal(by_nccl, by_mpi));
  }
}

TEST_P(Nccl, AllToAllWithUnevenAndZeroRows) {
  std::vector<Communicator::Run> send, receive;
  int64_t rows = 0;
  for (int r = 0; r < size; ++r) {
    send.push_back({r, (rank * 3 + r * 5) % 4 * 100});
    receive.push_back({r, (r * 3 + rank * 5) % 4 * 100});
    rows += send.back().rows;
  }
  const Tensor x = held({rows, 33});
  const Tensor y = nccl().all_to_all(x, send, receive);
  EXPECT_TRUE(at::equal(y, mpi->all_to_all(x, send, receive)));
  EXPECT_TRUE(at::equal(nccl().all_to_all(y, receive, send), x));
}

TEST_P(Nccl, BroadcastSendReceive) {
  for (int root = 0; root < size; ++root) {
    Tensor by_nccl = held({1001}), by_mpi = by_nccl.clone();
    nccl().broadcast(by_nccl, root);
    mpi->broadcast(by_mpi, root);
    EXPECT_TRUE(at::equal(by_nccl, by_mpi));
  }
  if (size == 1) return;
  for (const Communicator* group : {&nccl(), static_cast<const Communicator*>(mpi)}) {
    Tensor x = held({257, 3});
    if (rank == 0) group->send(x, size - 1);
    if (rank == size - 1) group->receive(x, 0);
    if (rank == size - 1) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{0});
      const Tensor sent = at::randn({257, 3}, generator, at::TensorOptions(at::kFloat)).mul_(50).round_().to(dtype());
      EXPECT_TRUE(at::equal(x.cpu(), sent));
    }
  }
}

TEST_P(Nccl, NeighboursSendToEachOtherAtOnce) {
  if (size == 1) return;
  const int next = (rank + 1) % size, before = (rank + size - 1) % size;
  const Tensor x = held({257, 3}), y = held({101});
  const std::vector<Communicator::Message> sent{{next, x}, {before, y}};
  std::vector<std::vector<Communicator::Message>> received;
  for (const Communicator* group : {&nccl(), static_cast<const Communicator*>(mpi)}) {
    received.push_back({{before, at::zeros_like(x)}, {next, at::zeros_like(y)}});
    group->send_receive(sent, received.back());
  }
  for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(at::equal(received[0][i].x, received[1][i].x));
}

TEST_P(Nccl, FollowsTheCurrentStream) {
  // The sum is enqueued between two pieces of work on a stream of its own; nothing waits on the host in between.
  const Tensor x = held({1 << 20});
  device::synchronize(gpu);
  Tensor by_mpi = x * 2;
  mpi->all_reduce(by_mpi);
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool(false, gpu.index()));
  for (int repetition = 0; repetition < 5; ++repetition) {
    Tensor doubled = x * 2;
    nccl().all_reduce(doubled);
    EXPECT_TRUE(at::equal(doubled + 1, by_mpi + 1));
  }
  device::synchronize(gpu);
}

TEST_P(Nccl, RegionsRunBackwardOnTheEnginesThread) {
  if (!at::isFloatingType(dtype())) GTEST_SKIP() << "whole numbers have no gradient";
  Splits splits;
  int64_t rows = 0;
  for (int r = 0; r < size; ++r) {
    splits.send.push_back({r, (rank + r) % size * 3});  // none to one rank, and as many rows in all on every rank
    splits.receive.push_back({r, (r + rank) % size * 3});
    rows += splits.send.back().rows;
  }
  const auto gradient = [&](const Communicator& group) {
    const Tensor x = held({rows, 8}).requires_grad_();
    const Tensor y = reduce_scatter_along(group, gather_along(group, exchange(group, x, splits), 1), 1);
    (y * held(y.sizes(), 7)).sum().backward();
    return x.grad();
  };
  EXPECT_TRUE(at::equal(gradient(nccl()), gradient(*mpi)));
}

TEST_P(Nccl, TheGpuHasANameAndMemory) {
  EXPECT_EQ(device::uuid(gpu).substr(0, 4), "GPU-");
  EXPECT_NE(device::name(gpu), device::name(c10::Device(c10::kCPU)));
  const device::Memory before = device::memory(gpu);
  const Tensor x = held({1 << 18});
  EXPECT_GE(device::memory(gpu).used, before.used + static_cast<int64_t>(x.nbytes()));
  EXPECT_GT(before.total, before.used);
}

}  // namespace
}  // namespace upcycle
