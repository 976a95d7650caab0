#pragma once
#include <chrono>
#include <condition_variable>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>

#include "base/error.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

/// Ends all ranks with `message` and `exit_code` when its scope is not left within `seconds`: for calls that a broken node would never
/// come back from.
class Deadline {
 public:
  Deadline(double seconds, std::string message, int exit_code)
      : thread_([this, seconds, message = std::move(message), exit_code] {
          std::unique_lock lock(mutex_);
          if (over_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return left_; })) return;
          std::cerr << text("upcycle: ", message, "\n") << std::flush;
          std::this_thread::sleep_for(std::chrono::seconds(1));   // others may have something to say, too
          abort_all_ranks(exit_code);
        }) {}
  ~Deadline() {
    {
      const std::lock_guard lock(mutex_);
      left_ = true;
    }
    over_.notify_all();
    thread_.join();
  }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool left_ = false;
  std::thread thread_;
};

}  // namespace upcycle
