#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

/// Does what it is told, in order, on a thread of its own, which calls neither MPI nor HDF5. Lends page-aligned memory for what is to
/// be written: at most `room` bytes at a time (at least one piece), page-locked where there is a GPU.
class WriterThread {
 public:
  explicit WriterThread(uint64_t room);
  /// Does not wait for what is queued: it is dropped, but for the task at hand.
  ~WriterThread();
  WriterThread(const WriterThread&) = delete;
  WriterThread& operator=(const WriterThread&) = delete;

  void set_room(uint64_t room);

  /// Memory of `bytes`; waits while the room is taken. For one thread at a time. Throws what a task threw.
  Tensor borrow(int64_t bytes);
  /// Gives memory back; from any thread.
  void give_back(Tensor memory);
  /// Memory that is no part of the room, for the task that runs, until it ends.
  Tensor scratch(int64_t bytes);
  /// The page-aligned bytes of memory that was borrowed.
  static std::span<std::byte> bytes_of(const Tensor& memory, int64_t bytes);

  /// Runs `task` behind the others. After a task has thrown, those behind it are dropped.
  void push(std::function<void()> task);
  /// True when nothing is left to do.
  bool idle() const;
  bool failed() const;
  /// Waits until nothing is left to do; throws what a task threw.
  void finish();

 private:
  void work();

  uint64_t room_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  std::vector<Tensor> spare_;   ///< of the largest size asked for so far
  int64_t size_ = 0;            ///< of a spare piece
  uint64_t lent_ = 0;
  Tensor scratch_;              ///< the thread's own
  bool busy_ = false, ending_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace upcycle
