#pragma once
#include <c10/core/Device.h>

#include <optional>
#include <utility>
#include <vector>

#include "device/moment.hpp"

/// How long this rank's device is at work by itself. In a step all ranks take equally long, for they wait for each other in every
/// collective; what tells a slow one is the time outside of them.
namespace upcycle::own_time {

/// A stretch of work, with its calls of Communicator.
struct Stretch {
  device::Moment begin, end;
  std::vector<std::pair<device::Moment, device::Moment>> calls = {};

  /// Its seconds less those of the calls that it was in line with. See Moment::seconds_until for when it may be asked.
  double seconds() const;
};

/// From now on the process's calls count, of all threads, until finish(). A stretch that was not finished is given up.
void start(c10::Device);
Stretch finish();

/// A call of Communicator, from here to the end of the scope. A call inside of another one is part of it. Costs nothing outside of a
/// stretch; else two moments.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  std::optional<device::Moment> begin_;
};

}  // namespace upcycle::own_time
