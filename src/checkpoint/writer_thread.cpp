#include "checkpoint/writer_thread.hpp"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "checkpoint/blocks.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

// Page-locked memory begins on a page, and LibTorch keeps it for the next time; a malloc of its own would not be aligned.
Tensor page_aligned(int64_t bytes) {
  if (device::count() > 0) return device::host_buffer(bytes);
  const auto size = static_cast<size_t>((bytes + Blocks::kAlignment - 1) / Blocks::kAlignment * Blocks::kAlignment);
  void* memory = std::aligned_alloc(Blocks::kAlignment, size);
  if (!memory) throw std::bad_alloc();
  return at::from_blob(memory, {static_cast<int64_t>(size)}, std::free, at::TensorOptions(at::kByte));
}

}  // namespace

WriterThread::WriterThread(uint64_t room) : room_(room), thread_([this] { work(); }) {}

WriterThread::~WriterThread() {
  {
    const std::lock_guard lock(mutex_);
    tasks_.clear();
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

Tensor WriterThread::borrow(int64_t bytes) {
  std::unique_lock lock(mutex_);
  if (bytes > size_) {
    spare_.clear();
    size_ = (std::max(bytes, Blocks::kBytes) + Blocks::kAlignment - 1) / Blocks::kAlignment * Blocks::kAlignment;
  }
  changed_.wait(lock, [&] { return error_ || lent_ == 0 || lent_ + static_cast<uint64_t>(size_) <= room_; });
  if (error_) std::rethrow_exception(error_);   // what it left undone gives nothing back
  lent_ += static_cast<uint64_t>(size_);
  if (!spare_.empty()) {
    Tensor memory = std::move(spare_.back());
    spare_.pop_back();
    return memory;
  }
  const int64_t size = size_;
  lock.unlock();
  return page_aligned(size);
}

void WriterThread::give_back(Tensor memory) {
  {
    const std::lock_guard lock(mutex_);
    const int64_t size = memory.numel();
    lent_ -= static_cast<uint64_t>(size);
    if (size == size_) spare_.push_back(std::move(memory));
  }
  changed_.notify_all();
}

Tensor WriterThread::scratch(int64_t bytes) {
  if (!scratch_.defined() || scratch_.numel() < bytes) scratch_ = page_aligned(std::max(bytes, Blocks::kBytes));
  return scratch_;
}

std::span<std::byte> WriterThread::bytes_of(const Tensor& memory, int64_t bytes) {
  return {static_cast<std::byte*>(memory.mutable_data_ptr()), static_cast<size_t>(bytes)};
}

void WriterThread::set_room(uint64_t room) {
  const std::lock_guard lock(mutex_);
  room_ = room;
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
