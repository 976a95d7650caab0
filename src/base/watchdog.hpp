#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/heartbeat.hpp"

namespace upcycle {

/// Ends a job in which a rank fails: no wait is unbounded. One per rank, with a thread of its own that never calls MPI.
///
/// From the start it looks after the processes of its own host: when one is gone, all leave within seconds. From watch() on the
/// ranks tell of each other by one small file each (the only way to *name* a silent rank of another host), and all leave when the
/// time-out passes without progress. One rank says which rank it was. Each process ends with _exit(1), whatever its other threads
/// wait for, upon which mpirun or srun ends the job; one that is stopped is killed by its neighbours. Time in which this process
/// itself did not run (a suspended job) does not count.
class Watchdog {
 public:
  /// `job`: the processes of all ranks. `last_act` is called before the process leaves, and given five seconds.
  Watchdog(int rank, std::vector<Process> job, double timeout_seconds, std::function<void()> last_act = {});
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Starts the heartbeats, in <directory>/heartbeat, and the time-out. Call it on all ranks before anyone works on.
  /// Throws UserError when the folder can't be written.
  void watch(const std::filesystem::path& directory);

  /// Whether `rank`'s heartbeat can be read from here; waits for it for up to `seconds`. After watch() on all ranks, false says that
  /// the run directory is not the same on both hosts.
  bool sees(int rank, double seconds) const;

  /// Progress: call it at least once per time-out, in long phases too. Cheap: stores three numbers. `doing` must be a literal;
  /// it appears in the message ("training", "writing a checkpoint").
  void beat(int64_t step, const char* doing = "training") noexcept;

 private:
  void look_on();
  void write();
  std::vector<int> gone() const;
  std::vector<Sighting> look_at(const std::vector<int>& ranks) const;
  /// Returns when another rank speaks, or has spoken.
  void speak(const std::string& words, const std::vector<int>& of_whom) const;
  [[noreturn]] void leave() const;

  const int rank_;
  const std::vector<Process> job_;
  const double timeout_, period_;      // seconds; period: between two heartbeats
  const std::function<void()> last_act_;
  std::vector<int> everyone_, locals_; // locals: the other ranks of this host, as far as this process sees them
  double tick_;                        // seconds between two looks at them
  std::filesystem::path folder_, verdict_;   // empty before watch()
  std::vector<Sighting> halfway_;      // all ranks when half of the time-out had passed without progress; empty before
  double quiet_ = 0, halfway_quiet_ = 0;
  int64_t count_ = 0;
  std::atomic<int64_t> step_{-1};
  std::atomic<const char*> doing_{"starting"};
  std::atomic<uint64_t> beats_{0};
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
};

}  // namespace upcycle
