#include "train/room_plan.hpp"

#include <algorithm>
#include <numeric>

namespace upcycle {

RoomPlan plan_room(const RunConfig& run, const CheckpointBytes& bytes, int64_t steps_done) {
  const CheckpointSection& settings = run.checkpoint;
  const int64_t steps = run.train.steps, left = std::max<int64_t>(0, steps - steps_done), every = settings.every;
  // Every so many steps, and at the end; without them only where a run stops.
  const int64_t to_come = left == 0 ? 0 : every > 0 ? (steps + every - 1) / every - steps_done / every : 1;
  int64_t kept = settings.keep + settings.keep_best;
  if (settings.keep_every > 0 && every > 0) kept += steps / std::lcm(every, settings.keep_every) + 1;   // and step 0
  RoomPlan plan{std::min(to_come + 1, kept + 1), 0};   // that one which is there, or step 0
  plan.bytes = static_cast<uint64_t>(plan.checkpoints) * bytes.full;
  if (steps_done == 0 && plan.checkpoints == to_come + 1) plan.bytes -= bytes.full - bytes.step_zero;
  return plan;
}

}  // namespace upcycle
