#include "checkpoint/writer_thread.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/quantities.hpp"

namespace upcycle {

WriterThread::WriterThread(uint64_t room, c10::Device device) : device_(device), room_(room), thread_([this] { work(); }) {}

WriterThread::~WriterThread() {
  {
    const std::lock_guard lock(mutex_);
    tasks_.clear();
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
  if (taker_.joinable()) taker_.join();
}

void WriterThread::set_room(uint64_t room, int64_t piece) {
  const std::lock_guard lock(mutex_);
  room_ = room;
  piece_ = piece;
  memory_.shrink(room);
}

void WriterThread::take_ahead(uint64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    ahead_ = bytes;
  }
  taker_ = std::thread([this, bytes] { take(bytes); });
}

void WriterThread::take(uint64_t bytes) {
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

// From the thread that borrows, the one that takes ahead, and the writer's own.
device::HostPages WriterThread::pages(int64_t bytes) {
  device::HostPages piece(bytes, device_);
  if (!piece.refusal().empty() && !told_.exchange(true)) {
    log::warning(text("page-locked memory for checkpoints can't be had (", piece.refusal(), "): they are copied into ordinary memory, which a GPU does more slowly"));
  }
  return piece;
}

bool WriterThread::takes() const {
  const std::lock_guard lock(mutex_);
  return ahead_ > 0;
}

uint64_t WriterThread::held() const {
  const std::lock_guard lock(mutex_);
  return std::max(ahead_, memory_.held());
}

std::span<std::byte> WriterThread::borrow(int64_t bytes) {
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

void WriterThread::give_back(std::span<std::byte> memory) {
  {
    const std::lock_guard lock(mutex_);
    memory_.give_back(memory);
  }
  changed_.notify_all();
}

std::span<std::byte> WriterThread::scratch(int64_t bytes) {
  if (scratch_.bytes().size() < static_cast<size_t>(bytes)) scratch_ = pages(std::max(bytes, Blocks::kBytes));
  return scratch_.bytes().first(static_cast<size_t>(bytes));
}

void WriterThread::push(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    if (!error_) tasks_.push_back(std::move(task));
  }
  changed_.notify_all();
}

bool WriterThread::idle() const {
  const std::lock_guard lock(mutex_);
  return tasks_.empty() && !busy_;
}

bool WriterThread::failed() const {
  const std::lock_guard lock(mutex_);
  return error_ != nullptr;
}

void WriterThread::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return tasks_.empty() && !busy_; });
  if (error_) std::rethrow_exception(error_);
}

void WriterThread::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return !tasks_.empty() || ending_; });
    if (tasks_.empty()) return;
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    busy_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;   // gives back what it holds, outside the lock
    lock.lock();
    busy_ = false;
    if (error) {
      error_ = error;
      tasks_.clear();
    }
    changed_.notify_all();
  }
}

}  // namespace upcycle
