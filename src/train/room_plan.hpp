#pragma once
#include <cstdint>

#include "config/run_config.hpp"
#include "train/snapshot.hpp"

namespace upcycle {

/// What a run's checkpoints take on the disk.
struct RoomPlan {
  int64_t checkpoints;   ///< the most that lie there at once: those that [checkpoint] keeps, and one that is being written
  uint64_t bytes;        ///< of them
};

/// Of a run of which `steps_done` steps are done; 0: step 0 is still to be stored. What lies in its directory already counts among these
/// checkpoints. Pure.
RoomPlan plan_room(const RunConfig&, const CheckpointBytes&, int64_t steps_done);

}  // namespace upcycle
