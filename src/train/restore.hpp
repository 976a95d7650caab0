#pragma once
#include <filesystem>
#include <optional>

#include "checkpoint/reader.hpp"
#include "train/bad_steps.hpp"
#include "train/snapshot.hpp"

namespace upcycle {

/// **Collective.** restore_checkpoint on all ranks, into weights that may be in training: moments that the checkpoint does not have, and
/// the number of updates, are as before the first step. Where values are damaged on some rank, all throw the same DamagedCheckpoint:
/// weights and optimizer are of no use then.
TrainingState restore_together(const CheckpointReader&, const Communicator& world, Weights&, Optimizer&);

/// **Collective.** `damaged` can't be loaded, `why`. Where the same folder has an older valid checkpoint, rank 0 renames the damaged one
/// (set_aside) and says so in the log; where not, nothing is touched. Whether there is one.
bool fall_back(const std::filesystem::path& damaged, const std::string& why, const Communicator& world);

/// **Collective.** What to roll back to, of the run's `checkpoints`: the newest valid one from which a good step was taken before the bad
/// ones, so that it is not its weights that make steps bad; where none is left, the newest from before them. Rank 0 looks.
std::optional<std::filesystem::path> last_good_checkpoint(const std::filesystem::path& checkpoints, const BadSteps&, const Communicator& world);

}  // namespace upcycle
