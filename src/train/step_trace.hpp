#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <memory>

namespace upcycle {

/// `train --profile FILE`: a trace of a few steps in Chrome's format, which Perfetto and chrome://tracing open, recorded by LibTorch's
/// profiler: every operation on the host, every kernel and copy on the GPU, and the program's own ranges (base/trace_range.hpp) as user
/// annotations. What is computed stays the same; the traced steps take longer, and those around them wait for the device.
class StepTrace {
 public:
  /// None.
  StepTrace();
  /// Of up to 3 steps, after 5 that warm up where the run has as many; `step`: those that are done when this start begins. With several
  /// ranks each writes a file of its own: trace.json becomes trace-rank0.json.
  StepTrace(std::filesystem::path file, int rank, int ranks, c10::Device device, int64_t step, int64_t steps);
  /// Throws UserError when `file` can't be written, as far as one sees without writing it.
  static void check(const std::filesystem::path& file);
  StepTrace(StepTrace&&) noexcept;
  StepTrace& operator=(StepTrace&&) noexcept;
  ~StepTrace();

  /// The trace begins or ends where `step` steps are done. There the device must have nothing left to do.
  bool begins(int64_t step) const noexcept { return !recording() && step == first_; }
  bool ends(int64_t step) const noexcept { return recording() && step >= end_; }
  bool recording() const noexcept { return recording_ != nullptr; }

  void begin();
  /// Writes the file; one that can't be written is a warning.
  void end();

 private:
  struct Recording;
  std::filesystem::path file_;
  c10::Device device_ = c10::Device(c10::kCPU);
  int64_t first_ = -1, end_ = -1;
  std::unique_ptr<Recording> recording_;
};

}  // namespace upcycle
