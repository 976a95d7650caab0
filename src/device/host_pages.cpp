#include "device/host_pages.hpp"

#ifdef UPCYCLE_CUDA
#include <cuda_runtime_api.h>
#endif

#include <sys/mman.h>

#include <new>
#include <utility>

namespace upcycle::device {
namespace {

constexpr size_t kPage = 4096;

// Why the memory can't be page-locked for the GPU; "" when it is. Not by cudaHostAlloc: finding and clearing the pages takes most of the
// time, and should not be spent inside of the driver, where the training step's own calls would wait for it.
std::string lock_pages([[maybe_unused]] std::span<std::byte> bytes, [[maybe_unused]] c10::Device device) {
#ifdef UPCYCLE_CUDA
  cudaError_t error = cudaSetDevice(device.index());   // a new thread has the first GPU, on which a context of this process would cost memory
  if (error == cudaSuccess) error = cudaHostRegister(bytes.data(), bytes.size(), cudaHostRegisterPortable);
  if (error == cudaSuccess) return "";
  static_cast<void>(cudaGetLastError());   // else whoever looks after the next kernel would find it
  return cudaGetErrorString(error);
#else
  return "this build has no CUDA";
#endif
}

}  // namespace

HostPages::HostPages(int64_t bytes, c10::Device device) {
  const size_t size = (static_cast<size_t>(bytes) + kPage - 1) / kPage * kPage;
  if (size == 0) return;
  // From the kernel, not malloc: which keeps what is freed, even gigabytes, if something behind it is still in use.
  void* const mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* const memory = static_cast<std::byte*>(mapped);
  bytes_ = {memory, size};
  for (size_t at = 0; at < size; at += kPage) const_cast<volatile std::byte&>(memory[at]) = std::byte{0};
  if (!device.is_cuda()) return;
  refusal_ = lock_pages(bytes_, device);
  locked_ = refusal_.empty();
}

HostPages::~HostPages() { release(); }

HostPages::HostPages(HostPages&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})), locked_(std::exchange(other.locked_, false)), refusal_(std::move(other.refusal_)) {}

HostPages& HostPages::operator=(HostPages&& other) noexcept {
  if (this == &other) return *this;
  release();
  bytes_ = std::exchange(other.bytes_, {});
  locked_ = std::exchange(other.locked_, false);
  refusal_ = std::move(other.refusal_);
  return *this;
}

void HostPages::release() noexcept {
#ifdef UPCYCLE_CUDA
  if (locked_) static_cast<void>(cudaHostUnregister(bytes_.data()));   // at the end of the process the driver may be gone before us
#endif
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

}  // namespace upcycle::device
