#pragma once
#include <atomic>
#include <cstdint>
#include <string>

namespace upcycle {

/// A stretch of the host's work under a name, from here to the end of the scope; ranges nest. Where a profiler listens it is a user
/// annotation of LibTorch's (at::RecordScope::USER_SCOPE): a bar in the trace of `train --profile`, a range in Nsight Systems. Where none
/// does it costs a look at one flag.
class TraceRange {
 public:
  /// `name` outlives it.
  explicit TraceRange(const char* name) {
    if (listening()) begin(name);
  }
  /// "layer 3".
  TraceRange(const char* name, int64_t number) {
    if (listening()) begin(name + (' ' + std::to_string(number)));
  }
  /// Nothing for an empty name.
  explicit TraceRange(const std::string& name) {
    if (listening() && !name.empty()) begin(name);
  }
  ~TraceRange() {
    if (record_) end();
  }
  TraceRange(const TraceRange&) = delete;
  TraceRange& operator=(const TraceRange&) = delete;

  /// The two innermost ranges of this thread, "layer 3/attention"; empty where nobody listens. What is recorded for backward takes it along.
  static std::string here();

  /// While one lives, somebody listens.
  class Listening {
   public:
    Listening() { ++listeners_; }
    ~Listening() { --listeners_; }
    Listening(const Listening&) = delete;
    Listening& operator=(const Listening&) = delete;
  };

 private:
  struct Record;
  static bool listening() noexcept { return listeners_.load(std::memory_order_relaxed) > 0; }
  void begin(std::string name);
  void end();

  static inline std::atomic<int> listeners_ = 0;
  Record* record_ = nullptr;   ///< owned; of a type that costs too much to include everywhere
};

}  // namespace upcycle
