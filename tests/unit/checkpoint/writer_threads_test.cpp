// What a writer's threads do side by side, and what they do not.
#include "checkpoint/writer_threads.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <thread>

#include "base/error.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr std::chrono::seconds kLong(20);
using Part = std::span<std::byte>;

// Each waits for the other: one after the other they would never end.
TEST(WriterThreads, TasksBesideEachOtherRunTogether) {
  WriterThreads writer(kMiB);
  std::promise<void> first, second;
  std::atomic<int> met = 0;
  const auto meet = [&](std::promise<void>& mine, std::promise<void>& other) {
    mine.set_value();
    met += other.get_future().wait_for(kLong) == std::future_status::ready;
  };
  writer.push_beside([&] { meet(first, second); });
  writer.push_beside([&] { meet(second, first); });
  writer.finish();
  EXPECT_EQ(met, 2);
}

TEST(WriterThreads, ATaskAloneSeparatesThoseBeforeItFromThoseBehind) {
  WriterThreads writer(kMiB);
  constexpr int kBeside = 20;
  std::atomic<int> running = 0, ended = 0;
  for (int round = 1; round <= 5; ++round) {
    for (int i = 0; i < kBeside; ++i) {
      writer.push_beside([&, i, round] {
        ++running;
        EXPECT_GE(ended, kBeside * (round - 1));
        std::this_thread::sleep_for(std::chrono::microseconds(i * 37 % 200));
        --running;
        ++ended;
      });
    }
    for (int twice = 0; twice < 2; ++twice) {
      writer.push([&, round] {
        EXPECT_EQ(++running, 1);
        EXPECT_EQ(ended, kBeside * round);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        EXPECT_EQ(running--, 1);
      });
    }
  }
  writer.finish();
  EXPECT_EQ(ended, 5 * kBeside);
}

TEST(WriterThreads, AfterAFailureWhatRunsEndsAndWhatIsQueuedNeverBegins) {
  WriterThreads writer(kMiB);
  std::promise<void> begun, failed;
  bool ended = false;
  std::atomic<int> others = 0;
  writer.push_beside([&] {
    begun.set_value();
    failed.get_future().wait_for(kLong);
    ended = true;
    fail("the second failure");
  });
  writer.push_beside([&] {
    begun.get_future().wait_for(kLong);
    fail("the first failure");
  });
  for (int i = 0; i < 10; ++i) writer.push_beside([&] { ++others; });
  writer.push([&] { ++others; });
  while (!writer.failed()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_FALSE(writer.idle()) << "one runs still";
  writer.push([&] { ++others; });   // too late
  EXPECT_EQ(user_error([&] { writer.borrow(1); }), "the first failure");
  failed.set_value();
  EXPECT_EQ(user_error([&] { writer.finish(); }), "the first failure");
  EXPECT_TRUE(ended);
  EXPECT_TRUE(writer.idle());
  EXPECT_EQ(others, 0);
}

TEST(WriterThreads, EachThreadHasScratchMemoryOfItsOwn) {
  WriterThreads writer(0);
  std::promise<Part> has;
  std::promise<void> seen;
  writer.push_beside([&] {
    has.set_value(writer.scratch(2 * kMiB));
    seen.get_future().wait_for(kLong);
  });
  writer.push_beside([&] {
    const Part other = has.get_future().get(), own = writer.scratch(kMiB);
    EXPECT_TRUE(own.data() >= other.data() + other.size() || other.data() >= own.data() + own.size());
    seen.set_value();
  });
  writer.finish();
  EXPECT_EQ(writer.held(), 0u) << "it is no part of the room";
}

}  // namespace
}  // namespace upcycle
