#include "device/moment.hpp"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace upcycle::device {

Moment::Moment(c10::Device device) : time_(std::chrono::steady_clock::now()) {
  if (device.is_cpu()) return;
  stream_ = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  event_ = std::make_shared<c10::Event>(device.type(), c10::EventFlag::BACKEND_DEFAULT);   // the one with a time
  event_->record(*stream_);
}

double Moment::seconds_until(const Moment& later) const {
  if (event_) return event_->elapsedTime(*later.event_) / 1e3;
  return std::chrono::duration<double>(later.time_ - time_).count();
}

}  // namespace upcycle::device
