// Host memory between checkpoints and a GPU: page-locked whichever thread takes it, and bytes arrive, in it and out of it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "checkpoint/reader.hpp"
#include "checkpoint/writer.hpp"
#include "checkpoint/writer_threads.hpp"
#include "device/device.hpp"
#include "device/host_pages.hpp"
#include "support/numbers.hpp"
#include "support/scratch.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

Tensor tensor_of(std::span<std::byte> bytes) { return at::from_blob(bytes.data(), {static_cast<int64_t>(bytes.size())}, at::TensorOptions(at::kByte)); }

TEST(HostMemory, IsPageLockedWhicheverThreadTakesIt) {
  const c10::Device gpu = device::choose("cuda", 0);
  at::empty({1}, at::TensorOptions(at::kByte).device(gpu));   // before LibTorch has used the GPU, no memory is pinned to it
  device::HostPages here(kMiB, gpu), there;
  std::thread([&] { there = device::HostPages(kMiB, gpu); }).join();
  for (const device::HostPages* pages : {&here, &there}) {
    EXPECT_EQ(pages->refusal(), "");
    EXPECT_TRUE(tensor_of(pages->bytes()).is_pinned());
  }
  EXPECT_FALSE(tensor_of(device::HostPages(kMiB, c10::Device(c10::kCPU)).bytes()).is_pinned());
}

TEST(HostMemory, TakenAheadItTakesWhatTheGpuHas) {
  const c10::Device gpu = device::choose("cuda", 0);
  WriterThreads writer(uint64_t{1} << 40, gpu);
  writer.set_room(uint64_t{1} << 40, 16 * kMiB);
  writer.take_ahead(64 * kMiB);
  const Tensor values = at::arange(kMiB, at::TensorOptions(at::kLong).device(gpu));
  const auto expect_values_in = [&](std::span<std::byte> bytes) {
    EXPECT_TRUE(tensor_of(bytes).is_pinned());
    const Tensor copy = at::from_blob(bytes.data(), {kMiB}, at::TensorOptions(at::kLong));
    copy.copy_(values);
    EXPECT_TRUE(at::equal(copy, at::arange(kMiB, at::kLong)));
  };
  for (int i = 0; i < 8; ++i) expect_values_in(writer.borrow(8 * kMiB));
  writer.push([&] { expect_values_in(writer.scratch(8 * kMiB)); });   // as a save that makes no copy takes them
  writer.finish();
  EXPECT_EQ(writer.held(), static_cast<uint64_t>(64 * kMiB));
}

// Blocks are lent in turns while threads read ahead: nothing is lent again before the GPU has taken it.
TEST(HostMemory, BlocksThatAreReadAheadReachTheGpu) {
  const c10::Device gpu = device::choose("cuda", 0);
  const Scratch scratch;
  const Communicator alone;
  const Shape shape = {16 * 1024, 1024};   // 67 MB: 16 blocks, more than are lent at a time
  const Tensor value = normal(shape, 1);
  {
    CheckpointWriter writer(scratch / "step-00000001", alone);
    const Piece piece{"w", shape, whole(shape), value.to(gpu)};
    writer.add(kWeightsFile, std::span(&piece, 1));
    writer.commit({.step = 1});
  }
  const CheckpointReader reader(scratch / "step-00000001");
  const Box box{{1000, 3}, {9000, 1000}};
  const Tensor part = value.narrow(0, 1000, 9000).narrow(1, 3, 1000);
  const int before = at::get_num_threads();
  for (const int threads : {1, 3, 8}) {
    at::set_num_threads(threads);
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << dtype << ", " << threads << " threads");
      const auto room = [&](const Shape& size) { return at::zeros(size, at::TensorOptions(dtype).device(gpu)); };
      std::vector<Piece> pieces = {{"w", shape, whole(shape), room(shape)}, {"w", shape, box, room(box.size)}, {"w", shape, box, room({1000, 9000}).t()}};
      reader.fill(kWeightsFile, pieces);
      EXPECT_TRUE(same_bits(pieces[0].local.cpu(), value.to(dtype)));
      for (const size_t i : {1u, 2u}) EXPECT_TRUE(same_bits(pieces[i].local.cpu(), part.to(dtype))) << "piece " << i;
    }
  }
  at::set_num_threads(before);
}

}  // namespace
}  // namespace upcycle
