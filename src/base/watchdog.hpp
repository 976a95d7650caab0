#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace upcycle {

/// What a rank last told about itself: <run directory>/heartbeat/rank_00003.
struct Heartbeat {
  int rank = 0;
  bool found = false;      ///< false: no such file, or not readable
  std::string host;
  int64_t pid = 0;
  int64_t step = -1;
  std::string doing;
  double progress = 0;     ///< seconds since 1970: the last beat()
  double alive = 0;        ///< likewise: when its watchdog thread last ran; old if the process is gone or stopped
};

Heartbeat read_heartbeat(const std::filesystem::path& folder, int rank);

/// Says in one sentence which ranks the others most likely wait for, at time `now`: those without a heartbeat or whose process
/// is silent for `quiet_seconds`; else those at the lowest step; else the one whose last beat is oldest. Pure.
std::string accuse(const std::vector<Heartbeat>&, double now, double quiet_seconds);

/// Ends a job in which a rank makes no progress: no wait is unbounded. A thread of its own looks on; it never calls MPI, and the
/// ranks tell of each other by one small file each (the only way to *name* a silent rank). One per rank, for the time of the run.
class Watchdog {
 public:
  /// `directory` is the run's; makes <directory>/heartbeat. Construct it on all ranks before anyone works on.
  /// Throws UserError when the folder can't be written.
  Watchdog(const std::filesystem::path& directory, int rank, int world, double timeout_seconds);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Progress: call it at least once per timeout, in long phases too. Cheap: stores three numbers. `doing` must be a literal;
  /// it appears in the message ("training", "writing step 400").
  /// When `timeout_seconds` pass without one, one rank prints a message that names the silent ranks, and the process leaves
  /// with _exit(1), upon which mpirun or srun ends the job.
  void beat(int64_t step, const char* doing = "training") noexcept;

 private:
  void look_on();
  void write() const;
  [[noreturn]] void leave() const;

  std::filesystem::path folder_;
  int rank_, world_;
  double timeout_;
  double period_;                   // seconds between two looks
  std::atomic<int64_t> step_{-1};
  std::atomic<const char*> doing_{"starting"};
  std::atomic<double> progress_;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
};

}  // namespace upcycle
