#pragma once
#include "train/snapshot.hpp"

namespace upcycle {

/// **Collective.** The state as <checkpoints>/step-NNNNNNNN, at once. Returns the folder; earlier checkpoints stay as they are.
inline std::filesystem::path save_checkpoint(const std::filesystem::path& checkpoints, const Mesh& mesh, Weights& weights, Optimizer* optimizer,
                                             const TrainingState& state, const RunRecord& record) {
  const std::filesystem::path folder = checkpoints / step_directory(state.step);
  CheckpointWriter writer(folder, mesh.world());
  writer.commit(add_snapshot(writer, mesh, weights, optimizer, state, record));
  return folder;
}

}  // namespace upcycle
