#pragma once
#include <utility>

namespace upcycle {

/// Owns one C handle (an HDF5 id, an MPI_Comm, a file descriptor): move-only, closed by `Close` unless it equals `Empty()`.
/// No implicit conversion: `get()` lends the handle. `Close` must not throw.
template <class T, auto Close, auto Empty>
class Handle {
 public:
  Handle() noexcept : value_(Empty()) {}
  explicit Handle(T value) noexcept : value_(value) {}
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, Empty())) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      reset();
      value_ = std::exchange(other.value_, Empty());
    }
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { reset(); }

  T get() const noexcept { return value_; }
  explicit operator bool() const noexcept { return value_ != Empty(); }
  /// Gives the handle up without closing it.
  T release() noexcept { return std::exchange(value_, Empty()); }
  void reset() noexcept {
    if (value_ != Empty()) Close(std::exchange(value_, Empty()));
  }

 private:
  T value_;
};

}  // namespace upcycle
