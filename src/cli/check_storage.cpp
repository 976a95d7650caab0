#include <algorithm>

#include "base/quantities.hpp"
#include "checkpoint/durable.hpp"
#include "cli/check_parts.hpp"
#include "train/room_plan.hpp"
#include "train/run_directory.hpp"

namespace upcycle {

namespace fs = std::filesystem;

void compare_room(Check& check) {
  if (!check.setup || !check.device) return;
  const Setup& setup = *check.setup;
  const CheckpointBytes bytes = checkpoint_bytes(setup.target.architecture, compute_dtype(check.config->train.precision));
  const RoomPlan plan = plan_room(*check.config, bytes, setup.resume ? setup.resume->manifest().step : 0);
  const fs::path checkpoints = setup.directory / "checkpoints";
  uint64_t there = 0;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(checkpoints, none)) there += room_taken(entry.path());
  const std::string what = text(plan.checkpoints, plan.checkpoints == 1 ? " checkpoint" : " checkpoints");
  check.report.room = text("checkpoints: ", plan.checkpoints, " at once at most, ", gigabytes(plan.bytes), "; ", gigabytes(there), " are there; ",
                           gigabytes(fs::space(existing_part(checkpoints), none).available), " are free");
  check.by_node("asking for free space", [&] {
    if (check.speaks()) {
      check_free_space(checkpoints, plan.bytes - std::min(there, plan.bytes), text("the rest of ", what, " (checkpoint.keep and keep_every, and one being written)"));
    }
  });
}

void measure_disks(Check& check) {
  std::string told;
  check.world.barrier();
  check.by_node("writing 256 MB into the run directory", [&] {
    if (check.speaks()) told = text(disk_speed(check.config->run.directory));
  });
  const std::vector<std::string> all = check.world.all_gather(told);
  for (NodeCheck& node : check.report.nodes) {
    if (const std::string& speed = all[static_cast<size_t>(node.ranks.front())]; !speed.empty()) node.disk = std::stod(speed);
  }
}

}  // namespace upcycle
