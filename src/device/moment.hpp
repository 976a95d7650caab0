#pragma once
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <memory>
#include <optional>

namespace c10 {
struct Event;
}

namespace upcycle::device {

/// A point in a device's work. On a CPU: now. On a GPU: when the current stream gets there; the host waits for nothing.
class Moment {
 public:
  explicit Moment(c10::Device);

  /// From here to `later`. On a GPU both must have been reached: ask after the wait for something that was asked of the stream later.
  double seconds_until(const Moment& later) const;
  /// False for two streams of a GPU, which do not wait for each other.
  bool in_line_with(const Moment& other) const { return stream_ == other.stream_; }

 private:
  std::chrono::steady_clock::time_point time_;
  std::shared_ptr<c10::Event> event_;   ///< null on a CPU
  std::optional<c10::Stream> stream_;
};

}  // namespace upcycle::device
