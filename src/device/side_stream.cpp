#include "device/side_stream.hpp"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace upcycle::device {
namespace {

c10::Stream current(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

}  // namespace

SideStream::SideStream(c10::Device device) : device_(device) {
  if (device.is_cuda()) stream_ = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, /*isHighPriority=*/true);
}

void SideStream::run(const std::function<void()>& enqueue) {
  if (!stream_) return enqueue();
  c10::Event asked(device_.type());
  asked.record(current(device_));
  asked.block(*stream_);
  const c10::StreamGuard guard(*stream_);
  enqueue();
}

SideStream::Mark SideStream::mark() const {
  if (!stream_) return nullptr;
  const auto mark = std::make_shared<c10::Event>(device_.type());
  mark->record(*stream_);
  return mark;
}

void SideStream::wait(const Mark& mark, c10::Device device) {
  if (mark) mark->block(current(device));
}

void SideStream::join() const { wait(mark(), device_); }

}  // namespace upcycle::device
