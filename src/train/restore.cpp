#include "train/restore.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/first_rank.hpp"

namespace upcycle {

namespace fs = std::filesystem;

TrainingState restore_together(const CheckpointReader& reader, const Communicator& world, Weights& weights, Optimizer& optimizer) {
  for (const Weight& weight : weights.all()) weight.parameter.arrived();   // of a step before: it must not come later
  optimizer.forget();
  TrainingState state;
  std::string damage;
  world.together([&] {
    try {
      state = restore_checkpoint(reader, weights, &optimizer);
    } catch (const DamagedCheckpoint& error) {   // together() would make a UserError of it
      damage = error.what();
    }
  });
  for (const std::string& told : world.all_gather(damage)) {
    if (!told.empty()) throw DamagedCheckpoint(told);
  }
  return state;
}

bool fall_back(const fs::path& damaged, const std::string& why, const Communicator& world) {
  int64_t found = 0;
  on_first_rank(world, [&] {
    const std::vector<fs::path> older = valid_checkpoints(damaged.parent_path(), *step_of(damaged.filename().string()));
    if (older.empty()) return;
    found = 1;
    const fs::path aside = set_aside(damaged);
    log::warning(text(why, "\nThis checkpoint is damaged: it is now ", aside.filename().string(), ", and the run goes on from the newest valid one before it, ",
                      older.front().filename().string()));
  });
  return world.all_reduce(found, Reduce::max) > 0;
}

std::optional<fs::path> last_good_checkpoint(const fs::path& checkpoints, const BadSteps& bad, const Communicator& world) {
  std::string chosen;
  on_first_rank(world, [&] {
    const std::vector<fs::path> before = valid_checkpoints(checkpoints, bad.first());
    const auto proven = std::find_if(before.begin(), before.end(), [&](const fs::path& one) { return *step_of(one.filename().string()) < bad.first() - 1; });
    if (!before.empty()) chosen = (proven == before.end() ? before.front() : *proven).string();
  });
  chosen = world.broadcast(chosen, 0);
  return chosen.empty() ? std::nullopt : std::optional<fs::path>(chosen);
}

}  // namespace upcycle
