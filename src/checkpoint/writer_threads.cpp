#include "checkpoint/writer_threads.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/quantities.hpp"

namespace upcycle {
namespace {

constexpr int kThreads = 2;   // one waits for the disk while the other hands it the next block

}  // namespace

WriterThreads::WriterThreads(uint64_t room, c10::Device device) : device_(device), room_(room) {
  for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { work(); });
}

WriterThreads::~WriterThreads() {
  {
    const std::lock_guard lock(mutex_);
    tasks_.clear();
    ending_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  if (taker_.joinable()) taker_.join();
}

void WriterThreads::set_room(uint64_t room, int64_t piece) {
  const std::lock_guard lock(mutex_);
  room_ = room;
  piece_ = piece;
  memory_.shrink(room);
}

void WriterThreads::take_ahead(uint64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    ahead_ = bytes;
  }
  taker_ = std::thread([this, bytes] { take(bytes); });
}

void WriterThreads::take(uint64_t bytes) {
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex_);
  bool failed = false;
  while (!ending_ && !failed && memory_.held() < bytes) {
    const auto size = std::min<int64_t>(piece_, static_cast<int64_t>(bytes - memory_.held()));
    lock.unlock();
    device::HostPages piece;
    try {
      piece = pages(size);
    } catch (const std::bad_alloc&) {
      failed = true;   // whoever borrows will hear of it, if it is still so then
    }
    lock.lock();
    if (!failed) memory_.add(std::move(piece));
    changed_.notify_all();
  }
  ahead_ = 0;
  const uint64_t held = memory_.held();
  const bool ended = ending_;
  changed_.notify_all();
  lock.unlock();
  if (ended) return;
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  log::info(text(gigabytes(held, 2), device_.is_cuda() && !told_ ? " of page-locked memory" : " of memory", " for copies of checkpoints are there after ",
                 std::llround(seconds.count()), " s"));
}

// From the thread that borrows, the one that takes ahead, and those that write.
device::HostPages WriterThreads::pages(int64_t bytes) {
  device::HostPages piece(bytes, device_);
  if (!piece.refusal().empty() && !told_.exchange(true)) {
    log::warning(text("page-locked memory for checkpoints can't be had (", piece.refusal(), "): they are copied into ordinary memory, which a GPU does more slowly"));
  }
  return piece;
}

bool WriterThreads::takes() const {
  const std::lock_guard lock(mutex_);
  return ahead_ > 0;
}

uint64_t WriterThreads::held() const {
  const std::lock_guard lock(mutex_);
  return std::max(ahead_, memory_.held());
}

std::span<std::byte> WriterThreads::borrow(int64_t bytes) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (error_) std::rethrow_exception(error_);   // what it left undone gives nothing back
    if (const auto part = memory_.lend(bytes)) return *part;
    if (ahead_ > 0) {   // what is on its way is here sooner than what would be taken beside it
      changed_.wait(lock);
      continue;
    }
    const int64_t size = std::max(bytes, piece_);
    if (!memory_.lends()) memory_.shrink(room_ - std::min(room_, static_cast<uint64_t>(size)));   // pieces that are too small for it
    if (memory_.lends() && memory_.held() + static_cast<uint64_t>(size) > room_) {
      changed_.wait(lock);
      continue;
    }
    lock.unlock();
    device::HostPages piece = pages(size);
    lock.lock();
    memory_.add(std::move(piece));
  }
}

void WriterThreads::give_back(std::span<std::byte> memory) {
  {
    const std::lock_guard lock(mutex_);
    memory_.give_back(memory);
  }
  changed_.notify_all();
}

std::span<std::byte> WriterThreads::scratch(int64_t bytes) {
  thread_local device::HostPages memory;   // ends with the thread, which is one of this object's
  if (memory.bytes().size() < static_cast<size_t>(bytes)) memory = pages(std::max(bytes, Blocks::kBytes));
  return memory.bytes().first(static_cast<size_t>(bytes));
}

void WriterThreads::queue(Task task) {
  {
    const std::lock_guard lock(mutex_);
    if (!error_) tasks_.push_back(std::move(task));
  }
  changed_.notify_all();
}

bool WriterThreads::idle() const {
  const std::lock_guard lock(mutex_);
  return done();
}

bool WriterThreads::failed() const {
  const std::lock_guard lock(mutex_);
  return error_ != nullptr;
}

void WriterThreads::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done(); });
  if (error_) std::rethrow_exception(error_);
}

bool WriterThreads::may_begin() const { return !tasks_.empty() && !alone_ && (running_ == 0 || !tasks_.front().alone); }

void WriterThreads::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return ending_ || may_begin(); });
    if (ending_) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    ++running_;
    alone_ = task.alone;
    lock.unlock();
    std::exception_ptr error;
    try {
      task.run();
    } catch (...) {
      error = std::current_exception();
    }
    task.run = nullptr;   // gives back what it holds, outside the lock
    lock.lock();
    --running_;
    alone_ = false;
    if (error) {
      if (!error_) error_ = error;
      tasks_.clear();
    }
    changed_.notify_all();
  }
}

}  // namespace upcycle
