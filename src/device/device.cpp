#include "device/device.hpp"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#ifdef UPCYCLE_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#endif

#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <iomanip>
#include <stdexcept>

#include "base/error.hpp"

namespace upcycle::device {
namespace {

/// The value of "key   : value" in one of Linux's status files; empty when it isn't there.
std::string field(const char* file, const std::string& key) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t colon = line.find(':');
    const size_t value = colon == std::string::npos ? colon : line.find_first_not_of(" \t", colon + 1);
    if (value != std::string::npos) return line.substr(value);
  }
  return {};
}

int64_t kilobytes(const std::string& key) {
  const std::string value = field("/proc/self/status", key);
  return value.empty() ? 0 : std::stoll(value) * 1024;
}

}  // namespace

c10::Device choose(const std::string& wish, int host_rank) {
  if (wish != "auto" && wish != "cpu" && wish != "cuda") {
    fail("run.device = \"", wish, "\": choose \"auto\", \"cpu\" or \"cuda\"");
  }
  const int gpus = wish == "cpu" ? 0 : count();
  if (wish == "cuda" && !cuda_built_in()) {
    fail("run.device = \"cuda\": this build has no CUDA; build with the preset cuda (cmake --preset cuda)");
  }
  if (wish == "cuda" && gpus == 0) {
    fail("run.device = \"cuda\": this process sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use \"cpu\"");
  }
  if (gpus == 0) return c10::Device(c10::kCPU);
  const auto index = static_cast<c10::DeviceIndex>(host_rank % gpus);
#ifdef UPCYCLE_CUDA
  c10::cuda::set_device(index);
#endif
  return c10::Device(c10::kCUDA, index);
}

void set_tf32(bool on) {
  at::globalContext().setAllowTF32CuBLAS(on);
  at::globalContext().setAllowTF32CuDNN(on);
}

void set_deterministic(bool on) {
  // One workspace a stream; ATen wants to read it here. Not overwritten, for ":16:8" would do, too.
  if (on) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);   // else at::empty writes all that it gives
}

bool deterministic() { return at::globalContext().deterministicAlgorithms(); }

Tensor host_buffer(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(count() > 0));
}

Tensor send(const Tensor& x, c10::Device device) {
  return device.is_cpu() ? x : x.pin_memory().to(x.options().device(device), /*non_blocking=*/true);
}

HostCopy::HostCopy(const Tensor& x) : host_(x) {
  if (x.is_cpu()) return;
  host_ = at::empty(x.sizes(), x.options().device(c10::kCPU).pinned_memory(true));
  host_.copy_(x, /*non_blocking=*/true);
  done_ = std::make_shared<c10::Event>(x.device().type());
  done_->record(c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()));
}

const Tensor& HostCopy::wait() const {
  if (done_) done_->synchronize();
  return host_;
}

#ifdef UPCYCLE_CUDA

bool cuda_built_in() noexcept { return true; }

// From the headers: asking the runtime fails where there is no driver, and --version must not.
std::string cuda_version() { return text(CUDART_VERSION / 1000, '.', CUDART_VERSION % 1000 / 10); }

int count() noexcept { return c10::cuda::device_count(); }

void synchronize(c10::Device device) {
  if (device.is_cpu()) return;
  const int before = c10::cuda::current_device();
  c10::cuda::set_device(device.index());
  c10::cuda::device_synchronize();
  c10::cuda::set_device(static_cast<c10::DeviceIndex>(before));
}

#else

bool cuda_built_in() noexcept { return false; }
std::string cuda_version() { return {}; }
int count() noexcept { return 0; }
void synchronize(c10::Device) {}

#endif

int compute_capability([[maybe_unused]] c10::Device device) {
#ifdef UPCYCLE_CUDA
  if (device.is_cuda()) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
    return 10 * major + minor;
  }
#endif
  return 0;
}

Memory memory(c10::Device device) {
  if (device.is_cpu()) {
    return {kilobytes("VmRSS"), kilobytes("VmHWM"), sysconf(_SC_PHYS_PAGES) * int64_t{sysconf(_SC_PAGE_SIZE)}};
  }
#ifdef UPCYCLE_CUDA
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
  const auto& bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  cudaDeviceProp properties;
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
  return {bytes.current, bytes.peak, static_cast<int64_t>(properties.totalGlobalMem)};
#else
  throw std::logic_error("this build has no CUDA, and so no GPU memory");
#endif
}

std::string name(c10::Device device) {
  if (device.is_cpu()) {
    const std::string model = field("/proc/cpuinfo", "model name");
    return model.empty() ? "CPU" : model;
  }
#ifdef UPCYCLE_CUDA
  cudaDeviceProp properties;
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
  return properties.name;
#else
  throw std::logic_error("this build has no CUDA, and so no GPU's name");
#endif
}

std::string uuid(c10::Device device) {
#ifdef UPCYCLE_CUDA
  if (device.is_cuda()) {
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
    std::ostringstream id;
    id << "GPU-" << std::hex << std::setfill('0');
    for (int i = 0; i < 16; ++i) {  // 8-4-4-4-12 digits, as nvidia-smi prints it
      if (i == 4 || i == 6 || i == 8 || i == 10) id << '-';
      id << std::setw(2) << static_cast<int>(static_cast<unsigned char>(properties.uuid.bytes[i]));
    }
    return id.str();
  }
#endif
  throw std::logic_error(text(device.str(), " is no GPU of this build, and has no UUID"));
}

}  // namespace upcycle::device
