// Memory that checkpoints are copied into: page-locked whichever thread takes it, and the GPU's bytes arrive in it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <gtest/gtest.h>

#include <thread>

#include "checkpoint/writer_thread.hpp"
#include "device/device.hpp"
#include "device/host_pages.hpp"

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
  WriterThread writer(uint64_t{1} << 40, gpu);
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

}  // namespace
}  // namespace upcycle
