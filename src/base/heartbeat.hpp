#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/process.hpp"

namespace upcycle {

/// What a rank last told about itself: <run directory>/heartbeat/rank_00003. No time of day is in it: hosts have different clocks.
struct Heartbeat {
  int rank = 0;
  bool found = false;   ///< false: no such file, or not readable
  Process process;
  int64_t step = -1;
  std::string doing;
  double quiet = 0;     ///< seconds without progress when it was written, by the rank's own clock
  int64_t count = 0;    ///< heartbeats so far: one that stays the same is old, whatever the reader's clock says
  int ranks = 0;        ///< of its job; 0 where an older program wrote it
  std::string life = {};   ///< names its job's start, the same for all its ranks: files of an earlier start may lie beside it
};

Heartbeat read_heartbeat(const std::filesystem::path& folder, int rank);

/// The heartbeats of all ranks of the start whose rank 0 wrote its last: where a rank has none of that start, one that was not found. Empty
/// where rank 0 has none.
std::vector<Heartbeat> read_heartbeats(const std::filesystem::path& folder);

/// Renamed into place, so that nobody reads half of it. False, and no error, when it can't be: a full disk must not end a run that
/// still computes.
bool write_heartbeat(const std::filesystem::path& folder, const Heartbeat&);

/// A rank as another one sees it.
struct Sighting {
  Heartbeat beat;
  Life life = Life::unknown;
  double unchanged = 0;   ///< seconds for which the one who looks has seen no newer heartbeat
};

/// Says in one sentence which ranks the others most likely wait for: those whose process is gone; else those that are stopped; else
/// those of other hosts without a new heartbeat; else those at the lowest step; else the one that has been quiet for longest. Pure.
std::string accuse(const std::vector<Sighting>&);

}  // namespace upcycle
