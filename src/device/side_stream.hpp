#pragma once
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <functional>
#include <memory>
#include <optional>

namespace c10 {
struct Event;
}

namespace upcycle::device {

/// A second stream of a GPU, for what should happen beside the computation. The host waits for nothing. On a CPU everything happens
/// at once, in the order of the calls. Tensors that are used on it must outlive the next join.
class SideStream {
 public:
  explicit SideStream(c10::Device);

  /// Runs `enqueue` with this stream as the current one of the calling thread, behind all that the current one was asked so far.
  void run(const std::function<void()>& enqueue);
  /// The point that this stream has reached when all that it was asked so far is done; null on a CPU.
  using Mark = std::shared_ptr<c10::Event>;
  Mark mark() const;
  /// The current stream goes on when `mark` is reached.
  static void wait(const Mark& mark, c10::Device);
  /// The current stream goes on when all that this one was asked is done.
  void join() const;

 private:
  c10::Device device_;
  std::optional<c10::Stream> stream_;   ///< none on a CPU
};

}  // namespace upcycle::device
