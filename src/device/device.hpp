#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/tensor.hpp"

namespace c10 {
struct Event;
}

/// The machine's devices. One code path for CPU and CUDA: a build without CUDA has zero GPUs.
namespace upcycle::device {

/// True in a build with CUDA, whether or not there is a GPU.
bool cuda_built_in() noexcept;
/// "13.0": the CUDA runtime of this build; empty without.
std::string cuda_version();

/// GPUs that this process sees; 0 without any, or without a driver.
int count() noexcept;

/// `wish` is run.device: "cpu", "cuda" or "auto" (CUDA when there is a GPU). The ranks of one host take its GPUs in turn.
/// Makes the GPU the current one of this thread. Throws UserError when "cuda" can't be had.
c10::Device choose(const std::string& wish, int host_rank);

/// Waits until the device has done everything asked of it; returns at once for the CPU.
void synchronize(c10::Device);

/// bf16 stays bf16; this is about fp32: with `on`, CUDA's matrix products may round their factors to TF32.
void set_tf32(bool on);

/// With `on`, ATen's and cuBLAS's operations give the same bits each time, or throw where they can't; before anything is computed.
void set_deterministic(bool on);
bool deterministic();

/// 90 for a GPU of compute capability 9.0; 0 for a CPU.
int compute_capability(c10::Device);

/// Uninitialised host memory [bytes], uint8; page-locked when there is a GPU, so that copies to and from it are asynchronous.
Tensor host_buffer(int64_t bytes);

/// `x`, which lies in host memory, on the device; through page-locked memory, so that the host waits for nothing.
Tensor send(const Tensor& x, c10::Device);

/// A tensor's way to the host. Asynchronous on the current stream; `wait` is for this copy alone, whatever was asked of the device
/// since. Of a CPU tensor it is that tensor itself.
class HostCopy {
 public:
  HostCopy() = default;
  explicit HostCopy(const Tensor&);
  bool defined() const noexcept { return host_.defined(); }
  const Tensor& wait() const;

 private:
  Tensor host_;
  std::shared_ptr<c10::Event> done_;  ///< null for a CPU tensor
};

struct Memory {
  int64_t used = 0;   ///< bytes in tensors now (GPU), resident now (CPU)
  int64_t peak = 0;   ///< the most there were
  int64_t total = 0;  ///< of the device
};
Memory memory(c10::Device);

/// "NVIDIA H200", or the CPU's name.
std::string name(c10::Device);
/// "GPU-c6e3...": the same for all processes on one GPU, whatever index each sees it under. Throws std::logic_error for a CPU.
std::string uuid(c10::Device);

}  // namespace upcycle::device
