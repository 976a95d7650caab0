#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "checkpoint/lent_memory.hpp"

namespace upcycle {

/// Does what it is told, on a few threads of its own, which call neither MPI nor HDF5: a disk that has one request at a time rests between
/// any two. Lends page-aligned memory for what is to be written, of at most `room` bytes (or what one part needs). Where `device`, which the
/// values come from, is a GPU, the memory is page-locked, or, if that can't be had, ordinary memory, with one line in the log.
class WriterThreads {
 public:
  explicit WriterThreads(uint64_t room, c10::Device device = c10::Device(c10::kCPU));
  /// Does not wait for what is queued, or for memory that is being taken: it is dropped, but for the tasks and the piece at hand.
  ~WriterThreads();
  WriterThreads(const WriterThreads&) = delete;
  WriterThreads& operator=(const WriterThreads&) = delete;

  /// From now on memory is taken in pieces of `piece` bytes (or what one part needs), and what is held beyond `room` goes, unless it is lent.
  void set_room(uint64_t room, int64_t piece = Blocks::kBytes);
  /// Begins to take memory until `bytes` are held, on a further thread, so that nobody waits for it when it is borrowed; says in the log when
  /// it is there. Once, before anything else is borrowed.
  void take_ahead(uint64_t bytes);
  bool takes() const;
  /// Bytes of memory, lent or not, what is still being taken ahead included.
  uint64_t held() const;

  /// Memory of `bytes`, from the beginning of a page on; waits while the room is taken, or while memory is being taken ahead. For one thread
  /// at a time. Throws what a task threw.
  std::span<std::byte> borrow(int64_t bytes);
  /// Gives memory back, as it was borrowed; from any thread.
  void give_back(std::span<std::byte> memory);
  /// Memory that is no part of the room, for the task that calls, until it ends.
  std::span<std::byte> scratch(int64_t bytes);

  /// Runs `task` alone: when all that were pushed before have ended, and before any behind it begins. After a task has thrown, those behind
  /// it are dropped.
  void push(std::function<void()> task) { queue({std::move(task), true}); }
  /// Runs `task` beside its neighbours that were pushed likewise, in no certain order.
  void push_beside(std::function<void()> task) { queue({std::move(task), false}); }
  /// True when nothing is left to do.
  bool idle() const;
  bool failed() const;
  /// Waits until nothing is left to do; throws what a task threw.
  void finish();

 private:
  struct Task {
    std::function<void()> run;
    bool alone;
  };
  void queue(Task);
  void work();
  bool may_begin() const;
  bool done() const { return tasks_.empty() && running_ == 0; }
  void take(uint64_t bytes);
  device::HostPages pages(int64_t bytes);

  const c10::Device device_;
  uint64_t room_;
  int64_t piece_ = Blocks::kBytes;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  LentMemory memory_;
  uint64_t ahead_ = 0;          ///< bytes that are being taken ahead; 0: none
  std::atomic<bool> told_ = false;   ///< that memory is not page-locked
  int running_ = 0;             ///< tasks
  bool alone_ = false;          ///< the one that runs
  bool ending_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
  std::thread taker_;
};

}  // namespace upcycle
