#include "base/threads.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <future>
#include <vector>

namespace upcycle {

void for_ranges(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& work) {
  const int64_t most = std::clamp<int64_t>(count / std::max<int64_t>(1, grain), 1, at::get_num_threads());
  const auto bound = [&](int64_t part) { return count / most * part + std::min(part, count % most); };
  std::vector<std::future<void>> others;   // wait for their threads when they go, also if one throws
  for (int64_t part = 1; part < most; ++part) others.push_back(std::async(std::launch::async, work, bound(part), bound(part + 1)));
  if (count > 0) work(0, bound(1));
  for (std::future<void>& other : others) other.get();
}

}  // namespace upcycle
