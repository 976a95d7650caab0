#pragma once
#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace upcycle::device {

/// Whole pages of host memory that are all there (touched: nobody waits for a page fault later), for copies to and from a device. For a GPU
/// they are page-locked, if its driver lets them: then copies run at the bus's speed. May be made on any thread; leaves that thread's GPU as
/// it was chosen, or chooses this one.
class HostPages {
 public:
  HostPages() = default;
  /// `bytes`, rounded up to whole pages. Throws std::bad_alloc.
  HostPages(int64_t bytes, c10::Device device);
  ~HostPages();
  HostPages(HostPages&&) noexcept;
  HostPages& operator=(HostPages&&) noexcept;

  std::span<std::byte> bytes() const noexcept { return bytes_; }
  /// Why they are not page-locked; "" where they are, and for a CPU, which needs none.
  const std::string& refusal() const noexcept { return refusal_; }

 private:
  void release() noexcept;

  std::span<std::byte> bytes_;
  bool locked_ = false;
  std::string refusal_;
};

}  // namespace upcycle::device
