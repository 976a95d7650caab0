#pragma once
#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace upcycle {

// The small files of a run directory through which a run and the people and job scripts around it talk:
//   finished   the run's: all of train.steps are done, and their last checkpoint is published. "step 1000"
//   save       asks for a checkpoint after the step at hand; the run removes it when that is published
//   stop       asks to save and leave with code 75, and keeps the run from starting again until it is removed

/// Throws UserError when `stop` is there.
void refuse_stop_file(const std::filesystem::path& directory);

/// Writes `finished`, durably.
void mark_finished(const std::filesystem::path& directory, int64_t step);
/// Removes it, durably: more steps are to be done. Puts it back as it was, unless some have begun: a start that fails changes nothing.
class Unfinished {
 public:
  explicit Unfinished(const std::filesystem::path& directory);
  ~Unfinished();
  Unfinished(const Unfinished&) = delete;
  Unfinished& operator=(const Unfinished&) = delete;
  void begun() noexcept { was_there_ = false; }

 private:
  const std::filesystem::path file_;
  bool was_there_;
  std::string content_;
};

/// What the files ask a run for, as one rank sees them.
class RunRequests {
 public:
  /// `looks`: this is the rank that does; to the others nothing is ever asked.
  RunRequests(std::filesystem::path directory, bool looks);

  /// Looks for the files, at most once a second: two stat(2). What they ask for is told in the log.
  void look();
  bool save() const { return asked_ && saving_ < 0; }
  bool stop() const { return stop_; }

  /// The checkpoint of `step`, which is what `save` asked for, is begun.
  void saving(int64_t step);
  /// All checkpoints up to that of `step` are published: `save` is removed when its own is among them, unless it was made anew meanwhile.
  void published(int64_t step);

 private:
  const std::filesystem::path directory_;
  const bool looks_;
  std::optional<std::chrono::steady_clock::time_point> looked_;
  std::optional<struct stat> asked_;   ///< the file `save`
  int64_t saving_ = -1;                ///< the step whose checkpoint is on its way for it
  bool stop_ = false;
};

}  // namespace upcycle
