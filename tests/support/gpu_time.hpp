#pragma once
#include <algorithm>
#include <vector>

#include "device/device.hpp"
#include "device/moment.hpp"

namespace upcycle {

/// Seconds of one of 30 calls on the first GPU, the median, after three that do not count; each behind another, so that the host's part is
/// not seen where the GPU has more to do than the host.
template <class Call>
double seconds(Call&& call) {
  constexpr size_t kCalls = 30;
  const at::Device gpu(at::kCUDA, 0);
  for (int i = 0; i < 3; ++i) call();
  std::vector<device::Moment> moments = {device::Moment(gpu)};
  while (moments.size() <= kCalls) {
    call();
    moments.emplace_back(gpu);
  }
  device::synchronize(gpu);
  std::vector<double> each;
  for (size_t i = 0; i < kCalls; ++i) each.push_back(moments[i].seconds_until(moments[i + 1]));
  std::nth_element(each.begin(), each.begin() + kCalls / 2, each.end());
  return each[kCalls / 2];
}

template <class Call>
double milliseconds(Call&& call) {
  return 1e3 * seconds(call);
}

}  // namespace upcycle
