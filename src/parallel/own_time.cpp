#include "parallel/own_time.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>

namespace upcycle::own_time {
namespace {

std::atomic<bool> under_way = false;
std::mutex mutex;   // backward on a GPU has a thread of its own
c10::Device at_work = c10::kCPU;
std::optional<device::Moment> began;
std::vector<std::pair<device::Moment, device::Moment>> calls_so_far;
thread_local int depth = 0;

}  // namespace

double Stretch::seconds() const {
  double seconds = begin.seconds_until(end);
  for (const auto& [first, last] : calls) {
    if (first.in_line_with(begin)) seconds -= first.seconds_until(last);
  }
  return std::max(seconds, 0.0);
}

void start(c10::Device device) {
  const std::lock_guard lock(mutex);
  at_work = device;
  calls_so_far.clear();
  began.emplace(device);
  under_way = true;
}

Stretch finish() {
  const std::lock_guard lock(mutex);
  if (!began) throw std::logic_error("no stretch of work was started");
  under_way = false;
  Stretch stretch{*began, device::Moment(at_work), std::move(calls_so_far)};
  calls_so_far.clear();
  began.reset();
  return stretch;
}

Call::Call() {
  if (depth++ == 0 && under_way) begin_.emplace(at_work);
}

Call::~Call() {
  --depth;
  if (!begin_ || !under_way) return;
  device::Moment end(at_work);
  const std::lock_guard lock(mutex);
  calls_so_far.emplace_back(std::move(*begin_), std::move(end));
}

}  // namespace upcycle::own_time
