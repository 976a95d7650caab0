#include "train/step_trace.hpp"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <unistd.h>

#include <algorithm>
#include <set>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/trace_range.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;

constexpr int64_t kWarmUp = 5, kSteps = 3;

std::filesystem::path of_rank(const std::filesystem::path& file, int rank, int ranks) {
  if (ranks == 1) return file;
  return file.parent_path() / text(file.stem().string(), "-rank", rank, file.extension().string());
}

}  // namespace

/// While one lives, LibTorch's profiler is on.
struct StepTrace::Recording {
  explicit Recording(c10::Device device) {
    std::set<ActivityType> activities = {ActivityType::CPU};
    if (device.is_cuda()) activities.insert(ActivityType::CUDA);
    const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
    profiler::prepareProfiler(config, activities);
    profiler::enableProfiler(config, activities);
  }
  ~Recording() {
    if (on) profiler::disableProfiler();
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  void write(const std::filesystem::path& file) {
    on = false;
    profiler::disableProfiler()->save(file.string());
  }

  TraceRange::Listening listening;
  bool on = true;
};

StepTrace::StepTrace(std::filesystem::path file, int rank, int ranks, c10::Device device, int64_t step, int64_t steps)
    : file_(of_rank(file, rank, ranks)),
      device_(device),
      first_(std::max(step, std::min(step + kWarmUp, steps - kSteps))),
      end_(std::min(first_ + kSteps, steps)) {}

void StepTrace::check(const std::filesystem::path& file) {
  const std::filesystem::path folder = file.has_parent_path() ? file.parent_path() : ".";
  std::error_code error;
  if (std::filesystem::is_directory(file, error)) fail("--profile ", file.string(), ": this is a directory; name a file");
  if (!std::filesystem::is_directory(folder, error)) fail("--profile ", file.string(), ": there is no directory ", folder.string());
  const auto& written = std::filesystem::exists(file, error) ? file : folder;
  if (access(written.c_str(), W_OK) != 0) fail("--profile ", file.string(), ": ", written.string(), " can't be written");
}

StepTrace::StepTrace() = default;
StepTrace::StepTrace(StepTrace&&) noexcept = default;
StepTrace& StepTrace::operator=(StepTrace&&) noexcept = default;
StepTrace::~StepTrace() = default;

void StepTrace::begin() {
  device::synchronize(device_);
  recording_ = std::make_unique<Recording>(device_);
}

void StepTrace::end() {
  device::synchronize(device_);
  std::error_code error;
  std::filesystem::remove(file_, error);   // so that what is there afterwards is this trace
  recording_->write(file_);
  recording_.reset();
  if (std::filesystem::file_size(file_, error) > 0 && !error) {
    log::info(text("the trace of steps ", first_ + 1, " to ", end_, " is in ", file_.string(), ": open it in ui.perfetto.dev"));
  } else {
    log::warning(text("--profile: the trace could not be written to ", file_.string()));
  }
  first_ = -1;   // one trace a start, also where the run rolls back
}

}  // namespace upcycle
