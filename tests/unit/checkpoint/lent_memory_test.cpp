// The memory that a writer lends: where parts lie, who waits for what, and what becomes of memory that is taken ahead.
#include "checkpoint/writer_threads.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <vector>

#include "device/device.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
using testing::Not;
constexpr int64_t kMiB = int64_t{1} << 20;
constexpr uint64_t kMuch = uint64_t{1} << 40;
using Part = std::span<std::byte>;

double seconds_of(const std::function<void()>& action) {
  const auto start = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool on_a_page(const Part& part) { return reinterpret_cast<uintptr_t>(part.data()) % Blocks::kAlignment == 0; }

TEST(LentMemory, SmallPartsFillWhatLargeOnesLeaveOver) {
  LentMemory memory;
  EXPECT_FALSE(memory.lend(1).has_value());
  memory.add(device::HostPages(3 * 4096, c10::Device(c10::kCPU)));
  memory.add(device::HostPages(4 * 4096, c10::Device(c10::kCPU)));
  const Part large = *memory.lend(2 * 4096 + 1), other = *memory.lend(4 * 4096);
  EXPECT_EQ(large.size(), 2 * 4096u + 1);
  EXPECT_FALSE(memory.lend(1).has_value()) << "a part takes whole pages";
  memory.give_back(large);
  const Part a = *memory.lend(4096), b = *memory.lend(5000);
  EXPECT_EQ(a.data(), large.data());
  EXPECT_EQ(b.data(), a.data() + 4096);
  for (const Part& part : {large, other, a, b}) EXPECT_TRUE(on_a_page(part));
  EXPECT_EQ(memory.held(), 7 * 4096u);
  memory.shrink(0);
  EXPECT_EQ(memory.held(), 7 * 4096u) << "all of it is lent";
  memory.give_back(other);
  memory.give_back(a);
  EXPECT_FALSE(memory.lend(2 * 4096).has_value() && memory.lend(3 * 4096).has_value()) << "a piece begins anew only when all of its parts are back";
}

TEST(LentMemory, ShrinksByWhatNobodyHas) {
  LentMemory memory;
  for (int i = 0; i < 3; ++i) memory.add(device::HostPages(4096, c10::Device(c10::kCPU)));
  const Part first = *memory.lend(1), second = *memory.lend(1);
  memory.give_back(first);
  memory.shrink(2 * 4096);
  EXPECT_EQ(memory.held(), 2 * 4096u);
  memory.shrink(0);
  EXPECT_EQ(memory.held(), 4096u);
  EXPECT_TRUE(memory.lends());
  memory.give_back(second);
  EXPECT_FALSE(memory.lends());
  EXPECT_THROW(memory.give_back(second), std::logic_error);
}

TEST(WriterThreads, WhatIsLentStaysWithinTheRoom) {
  WriterThreads writer(16 * kMiB);
  size_t most = 0, lent = 0;
  std::mutex mutex;
  for (int i = 0; i < 64; ++i) {
    const int64_t size = i % 3 == 0 ? 5000 : 4 * kMiB;   // norms between matrices
    const Part part = writer.borrow(size);
    EXPECT_TRUE(on_a_page(part));
    {
      const std::lock_guard lock(mutex);
      lent += part.size();
      most = std::max(most, lent);
    }
    std::memset(part.data(), i, part.size());
    writer.push_beside([&, part, i] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      EXPECT_TRUE(std::all_of(part.begin(), part.end(), [&](std::byte byte) { return byte == static_cast<std::byte>(i); })) << i;
      {
        const std::lock_guard lock(mutex);
        lent -= part.size();
      }
      writer.give_back(part);
    });
  }
  writer.finish();
  EXPECT_LE(most, 16u * kMiB);
  EXPECT_GT(most, 8u * kMiB) << "more than one at a time";
  EXPECT_LE(writer.held(), 16u * kMiB);
}

TEST(WriterThreads, SmallTensorsTakeLittleOfACopy) {
  WriterThreads writer(0);
  writer.set_room(8 * kMiB, 8 * kMiB);
  std::vector<Part> parts;
  for (int i = 0; i < 500; ++i) parts.push_back(writer.borrow(8192));   // would wait for ever for a second piece
  EXPECT_EQ(writer.held(), 8u * kMiB);
  for (const Part& part : parts) writer.give_back(part);
}

TEST(WriterThreads, APartLargerThanTheRoomIsLentAlone) {
  WriterThreads writer(kMiB, c10::Device(c10::kCPU));
  const Part small = writer.borrow(100);
  std::promise<void> asked;
  std::future<void> large = std::async(std::launch::async, [&] {
    asked.set_value();
    const Part part = writer.borrow(9 * kMiB);
    EXPECT_EQ(writer.held(), 9u * kMiB) << "the small piece has gone";
    writer.give_back(part);
  });
  asked.get_future().wait();
  EXPECT_EQ(large.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  writer.give_back(small);
  large.get();
}

TEST(TakenAhead, WhoeverComesEarlyWaitsForItAndTakesNoneBesideIt) {
  WriterThreads writer(kMuch);
  writer.set_room(kMuch, 16 * kMiB);
  writer.take_ahead(512 * kMiB);
  EXPECT_EQ(writer.held(), 512u * kMiB) << "what is still to come counts";
  std::vector<Part> parts;
  bool came_early = false;
  for (int i = 0; i < 128; ++i) {
    parts.push_back(writer.borrow(4 * kMiB));
    came_early |= writer.takes();
  }
  EXPECT_TRUE(came_early);
  EXPECT_EQ(writer.held(), 512u * kMiB);
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.data() < b.data(); });
  for (size_t i = 1; i < parts.size(); ++i) EXPECT_LE(parts[i - 1].data() + parts[i - 1].size(), parts[i].data());
  writer.give_back(parts.back());
  EXPECT_EQ(writer.held(), 512u * kMiB) << "it stays for the next save";
}

TEST(TakenAhead, IsThereBeforeItIsAskedFor) {
  const int64_t before = device::memory(c10::Device(c10::kCPU)).used;
  testing::internal::CaptureStderr();
  {
    WriterThreads writer(kMuch);
    writer.set_room(kMuch, 16 * kMiB);
    writer.take_ahead(256 * kMiB);
    while (writer.takes()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_GE(device::memory(c10::Device(c10::kCPU)).used, before + 250 * kMiB) << "touched, not only promised";
  }
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("0.27 GB of memory for copies of checkpoints are there after"));
}

TEST(TakenAhead, WhoeverLeavesMeanwhileWaitsForOnePieceAtMost) {
  constexpr uint64_t kAll = uint64_t{8} << 30;   // takes seconds
  const int64_t peak = device::memory(c10::Device(c10::kCPU)).peak;
  const double seconds = seconds_of([&] {
    WriterThreads writer(kAll);
    writer.set_room(kAll, 16 * kMiB);
    writer.take_ahead(kAll);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  });
  EXPECT_LT(seconds, 1.0);
  EXPECT_LT(device::memory(c10::Device(c10::kCPU)).peak, peak + 4096 * kMiB);
}

// A GPU that is not there: its driver, or the lack of one, refuses to page-lock anything.
TEST(TakenAhead, WithoutPageLockedMemoryOrdinaryMemoryServesWithOneLineInTheLog) {
  if (device::count() > 0) GTEST_SKIP() << "there is a GPU";
  testing::internal::CaptureStderr();
  {
    WriterThreads writer(kMuch, c10::Device(c10::kCUDA, 0));
    writer.set_room(kMuch, 16 * kMiB);
    writer.take_ahead(64 * kMiB);
    for (int i = 0; i < 32; ++i) {   // more than was taken
      const Part part = writer.borrow(4 * kMiB);
      std::memset(part.data(), i, part.size());
    }
    writer.push([&] { std::memset(writer.scratch(kMiB).data(), 1, kMiB); });
    writer.finish();
    EXPECT_EQ(writer.held(), 128u * kMiB);
  }
  const std::string said = testing::internal::GetCapturedStderr();
  const std::string line = "page-locked memory for checkpoints can't be had (";
  EXPECT_THAT(said, HasSubstr(line));
  EXPECT_THAT(said.substr(said.find(line) + 1), Not(HasSubstr(line))) << "once";
  EXPECT_THAT(said, Not(HasSubstr("of page-locked memory")));
}

}  // namespace
}  // namespace upcycle
