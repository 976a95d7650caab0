#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace upcycle {

/// A run of one arm.
struct SweepJob {
  size_t arm = 0;                        ///< index into the sweep's arms
  std::vector<std::string> command;      ///< its first word is looked for in PATH
  std::filesystem::path log;             ///< standard output and error are added to it
};

/// How it ended.
struct JobEnd {
  size_t arm = 0;
  int code = 0;           ///< exit code; 128 + the signal's number where a signal ended it
  double seconds = 0;
  bool wished = false;    ///< it ended after this process was asked to stop
};

/// Runs `jobs` in order, `at_once` at a time, each with its share of the GPUs (gpu_slots.hpp), and tells `ended` of each end as it comes, `started` of each start. When this process is
/// asked to stop (base/shutdown.hpp), running jobs get USR2, as Slurm would send it, and no further ones are started; returns whether it
/// was. A job that can't be started ends with code 127 and a line in its log. The jobs' process groups are their own: a terminal's ^C
/// reaches this process alone, which is to be listened for. They get USR2, too, when this process is killed: call it from the main thread.
bool run_jobs(const std::vector<SweepJob>& jobs, size_t at_once, const std::function<void(const SweepJob&)>& started,
              const std::function<void(const JobEnd&)>& ended);

/// Why a job failed, out of its log: the program's last message, or the last lines, for people.
std::string what_went_wrong(const std::filesystem::path& log);

}  // namespace upcycle
