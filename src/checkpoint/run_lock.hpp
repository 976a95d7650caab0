#pragma once
#include <chrono>
#include <filesystem>

#include "checkpoint/durable.hpp"

namespace upcycle {

/// One job per run directory: the file `lock` in it, held by one process of the job (rank 0) for its lifetime. Two
/// nets: flock(2), which the kernel lets go at death, and, for file systems whose flock other hosts don't see or whose
/// server keeps it for a host that is gone, what the file says of its holder, and the holder's signs of life: the
/// heartbeat of rank 0 (base/heartbeat.hpp), which counts on every few seconds, and touch().
class RunLock {
 public:
  /// A lock of another host whose holder gave no sign of life for this long, while it was looked at, belongs to a dead
  /// job. Heartbeats come every 5 s.
  static constexpr std::chrono::seconds kProof{30};
  /// The same for a holder that has no heartbeat (`convert`), by the age of the file.
  static constexpr std::chrono::minutes kStale{10};

  /// Makes the directory. Throws UserError naming job, host, process and heartbeat of the holder and what to do. The
  /// lock of another host's silent holder is taken after `proof`, and the log says so; a requeued Slurm job takes that
  /// of its own earlier start at once, wherever that ran.
  explicit RunLock(const std::filesystem::path& run_directory, std::chrono::duration<double> proof = kProof);
  RunLock(RunLock&&) noexcept = default;
  /// Gives the lock back: another host need not wait.
  ~RunLock();

  /// Says "still here"; once a step.
  void touch() const noexcept;

  /// Nobody has the lock of this directory, or its last holder gave it back. A holder that was killed did not.
  static bool is_free(const std::filesystem::path& run_directory);

 private:
  FileDescriptor file_;
};

}  // namespace upcycle
