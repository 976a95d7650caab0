#pragma once
#include <optional>
#include <string>
#include <vector>

#include "base/heartbeat.hpp"

namespace upcycle {

/// The most seconds that a run may need.
struct ProgressLimits {
  double start = 1800;        ///< from the first look to the end of each rank's first step; and for what is done between later steps,
                              ///< validation for example
  double step = 600;
  double checkpoint = 1800;   ///< to write one, once steps are done
};

/// Watches a run by its heartbeats, from outside. Only durations by the watcher's own clock count: hosts have different ones.
class ProgressWatch {
 public:
  explicit ProgressWatch(ProgressLimits);

  /// `beats`: read_heartbeats as they are now; `passed`: seconds since the look before. Heartbeats that lay there at the first look belong to
  /// an earlier start, until they change.
  void look(const std::vector<Heartbeat>& beats, double passed);

  /// Some start of the run has been seen alive.
  bool begun() const { return begun_; }
  /// Its rank 0 has taken leave: finished, stopped or failed.
  bool left() const { return begun_ && (last_.front().beat.doing == "finished" || last_.front().beat.doing == "failed"); }
  /// When a limit has passed: which, and, of a run that has begun, whom it waits for (accuse). Of processes on this host it asks /proc.
  std::optional<std::string> verdict() const;
  int64_t step() const { return begun_ ? last_.front().beat.step : -1; }

 private:
  struct Seen {
    Heartbeat beat;
    double changed = 0;    ///< when `count` last did
    double phase = 0;      ///< when step or doing last did
    bool stepped = false;  ///< it has been training in this start
  };
  std::vector<Sighting> sightings(double limit) const;

  const ProgressLimits limits_;
  double now_ = 0, began_ = 0;   ///< seconds since the first look; of the first look at this start
  bool looked_ = false, begun_ = false;
  Heartbeat old_;                ///< rank 0's at the first look
  std::vector<Seen> last_;       ///< by rank; empty before the run has begun
};

}  // namespace upcycle
