#pragma once
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cli/command.hpp"

namespace upcycle {

/// Ends a start to which not all of its ranks come, and says which. It begins before MPI, which would wait for them for ever: on a node with a
/// hanging file system, say, or whose network is gone. As long as all goes well it does nothing. When the ranks have not met for `patience`
/// seconds, each that lives leaves a file with its node's name in a directory that all share; a third of that time later the lowest of them
/// says who has left none, removes the files, and ends all ranks with code 1.
class RollCall {
 public:
  /// This process is `rank` of `ranks`, by its launcher. `directory` is asked for when it is needed; empty when there is none: then each rank
  /// speaks for itself.
  RollCall(double patience, int rank, int ranks, std::function<std::filesystem::path()> directory);
  /// No rank is waited for any longer.
  ~RollCall();
  RollCall(const RollCall&) = delete;
  RollCall& operator=(const RollCall&) = delete;

  /// To the living roll call, if there is one: this rank has heard of all others. From then on they have a minute to meet again, which
  /// is longer than what a rank does by itself may take (kPatience).
  static void met() noexcept;

 private:
  void wait();
  double grace() const;   ///< seconds that the others have to answer
  void call(std::unique_lock<std::mutex>&);
  bool still_alone(std::unique_lock<std::mutex>&, double seconds);

  double patience_;
  const int rank_, ranks_;
  const std::function<std::filesystem::path()> directory_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  int met_ = 0;
  std::thread thread_;
};

/// For `check` on several ranks, as its --wait says; null for everything else.
std::unique_ptr<RollCall> call_roll(const Arguments&);

/// "ranks 4-6 (node n3) and rank 7 (node n4)": those that have not `answered`, which is the node's name for those that have. `expected` is the node of each
/// rank where that is known, and believed only as far as it agrees with the answers; else those that have answered are named. Pure.
std::string who_is_missing(const std::vector<std::string>& answered, const std::vector<std::string>& expected);

}  // namespace upcycle
