#pragma once
#include <optional>
#include <string>
#include <vector>

namespace upcycle {

/// Which rank keeps the others waiting: from each rank's seconds of own work (parallel/own_time.hpp), over some steps. Pure.
class Stragglers {
 public:
  /// `hosts`: of every rank.
  explicit Stragglers(std::vector<std::string> hosts = {}) : hosts_(std::move(hosts)), sums_(hosts_.size()), steps_(hosts_.size()) {}

  /// One step's seconds, by rank; a rank that has none yet says 0.
  void add(const std::vector<double>& seconds);

  struct Slowest {
    int rank;
    std::string host;
    double seconds;                    ///< of a step, the mean
    double over_median;                ///< seconds over the median of all ranks
    std::vector<double> seconds_of_rank;
  };
  /// Of the steps since the last call; nothing where a rank has told of none, and of a single rank.
  std::optional<Slowest> take();

 private:
  std::vector<std::string> hosts_;
  std::vector<double> sums_;
  std::vector<int> steps_;
};

}  // namespace upcycle
