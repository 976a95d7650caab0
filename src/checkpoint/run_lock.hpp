#pragma once
#include <chrono>
#include <filesystem>

#include "checkpoint/durable.hpp"

namespace upcycle {

/// One job per run directory: the file `lock` in it, held by one process of the job (rank 0) for its lifetime. Two
/// nets: flock(2), which the kernel lets go at death, and, for file systems whose flock other hosts don't see, the name
/// of the holder's host and the file's age: touch() keeps it young.
class RunLock {
 public:
  /// A lock of another host that was not touched for this long belongs to a dead job.
  static constexpr std::chrono::minutes kStale{10};

  /// Makes the directory. Throws UserError naming host and process of the holder and what to do. A requeued Slurm job
  /// takes the lock of its own earlier start at once, wherever that ran.
  explicit RunLock(const std::filesystem::path& run_directory);
  RunLock(RunLock&&) noexcept = default;
  /// Gives the lock back: another host need not wait.
  ~RunLock();

  /// Says "still here"; once a step.
  void touch() const noexcept;

 private:
  FileDescriptor file_;
};

}  // namespace upcycle
