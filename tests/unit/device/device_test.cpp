#include "device/device.hpp"

#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.hpp"

namespace upcycle {
namespace {

std::string refusal(const std::string& wish) {
  try {
    device::choose(wish, 0);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Device, CpuIsAlwaysThere) {
  EXPECT_EQ(device::choose("cpu", 3), c10::Device(c10::kCPU));
  device::synchronize(c10::Device(c10::kCPU));
  EXPECT_FALSE(device::name(c10::Device(c10::kCPU)).empty());
  EXPECT_THROW(device::uuid(c10::Device(c10::kCPU)), std::logic_error);
}

TEST(Device, AutomaticTakesTheGpusInTurn) {
  const int gpus = device::count();
  for (const int rank : {0, 1, 5}) {
    const c10::Device chosen = device::choose("auto", rank);
    EXPECT_EQ(chosen.is_cuda(), gpus > 0);
    if (gpus > 0) EXPECT_EQ(chosen.index(), rank % gpus);
  }
}

TEST(Device, DeterministicIsAsAsked) {
  EXPECT_FALSE(device::deterministic());
  device::set_deterministic(true);
  EXPECT_TRUE(device::deterministic() && !at::globalContext().deterministicAlgorithmsWarnOnly());
  EXPECT_FALSE(at::globalContext().deterministicFillUninitializedMemory());
  EXPECT_NE(std::getenv("CUBLAS_WORKSPACE_CONFIG"), nullptr);
  device::set_deterministic(false);
  EXPECT_FALSE(device::deterministic());
  EXPECT_EQ(device::compute_capability(c10::Device(c10::kCPU)), 0);
}

TEST(Device, RefusesWhatIsNotThere) {
  EXPECT_EQ(refusal("gpu"), "run.device = \"gpu\": choose \"auto\", \"cpu\" or \"cuda\"");
  if (!device::cuda_built_in()) {
    EXPECT_EQ(device::count(), 0);
    EXPECT_EQ(device::cuda_version(), "");
    EXPECT_EQ(refusal("cuda"),
              "run.device = \"cuda\": this build has no CUDA; build with the preset cuda (cmake --preset cuda)");
    const c10::Device gpu(c10::kCUDA, 0);
    EXPECT_THROW(device::memory(gpu), std::logic_error);
    EXPECT_THROW(device::name(gpu), std::logic_error);
    EXPECT_THROW(device::uuid(gpu), std::logic_error);
  } else if (device::count() == 0) {
    EXPECT_EQ(
        refusal("cuda"),
        "run.device = \"cuda\": this process sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use \"cpu\"");
  } else {
    EXPECT_EQ(refusal("cuda"), "accepted");
  }
}

TEST(Device, MemoryOfThisProcess) {
  const int64_t bytes = int64_t{32} << 20;
  const device::Memory before = device::memory(c10::Device(c10::kCPU));
  EXPECT_GT(before.used, 0);
  EXPECT_GT(before.total, before.used);
  const Tensor buffer = device::host_buffer(bytes);
  EXPECT_EQ(buffer.nbytes(), static_cast<size_t>(bytes));
  buffer.fill_(1);  // pages come as they are touched
  const device::Memory after = device::memory(c10::Device(c10::kCPU));
  EXPECT_GE(after.used, before.used + bytes / 2);
  EXPECT_GE(after.peak, after.used);
}

TEST(Device, ACpuTensorsWayToTheHostIsNone) {
  const Tensor x = device::host_buffer(3).fill_(7);
  EXPECT_TRUE(device::HostCopy(x).wait().is_same(x));
  EXPECT_TRUE(device::send(x, c10::Device(c10::kCPU)).is_same(x));
  EXPECT_FALSE(device::HostCopy().defined());
}

TEST(Device, Tf32IsAChoice) {
  device::set_tf32(true);
  EXPECT_TRUE(at::globalContext().allowTF32CuBLAS());
  device::set_tf32(false);
  EXPECT_FALSE(at::globalContext().allowTF32CuBLAS());
}

}  // namespace
}  // namespace upcycle
