#include "base/threads.hpp"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

namespace upcycle {
namespace {

struct Threads {
  explicit Threads(int number) { at::set_num_threads(number); }
  ~Threads() { at::set_num_threads(before); }
  int before = at::get_num_threads();
};

TEST(Threads, EveryNumberIsInOneRange) {
  for (const int threads : {1, 2, 4, 7}) {
    const Threads use(threads);
    for (const int64_t count : {0, 1, 2, 6, 7, 8, 100, 1001}) {
      for (const int64_t grain : {1, 3, 50, 5000}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
        std::atomic<int64_t> ranges = 0;
        for_ranges(count, grain, [&](int64_t begin, int64_t end) {
          ++ranges;
          EXPECT_GE(end - begin, std::min(count, grain));
          for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
        });
        for (const auto& times : visits) ASSERT_EQ(times, 1);
        EXPECT_EQ(ranges, count == 0 ? 0 : std::clamp<int64_t>(count / grain, 1, threads));
      }
    }
  }
}

TEST(Threads, AnExceptionComesBackWhenAllAreDone) {
  const Threads use(4);
  for (const int64_t bad : {0, 99}) {
    std::atomic<int64_t> done = 0;
    EXPECT_THROW(for_ranges(100, 1, [&](int64_t begin, int64_t end) {
                   if (begin <= bad && bad < end) throw std::runtime_error("bad");
                   done += end - begin;
                 }), std::runtime_error);
    EXPECT_EQ(done, 75);
  }
}

}  // namespace
}  // namespace upcycle
