#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "parallel/communicator.hpp"
#include "train/setup.hpp"
#include "train/start.hpp"

namespace upcycle {

/// The tensors of a checkpoint that nobody has trained yet, as functions of boxes: what can be written without a model in memory.
struct StepZero {
  std::vector<ParameterSpec> specs;
  std::function<at::ScalarType(const ParameterSpec&)> stored;   ///< dtype in weights.h5
  /// Whether that dtype holds every value: then `fill` is given targets of it. Else targets are fp32, and rounded afterwards.
  std::function<bool(const ParameterSpec&)> exact;
  Fill fill;
  FillMoment moment = {};   ///< where moments are stored, too
  bool by_expert = false;   ///< `fill` looks at a whole expert before it gives any part of it: each expert is best left to one rank
};

/// What step 0 of a run is, see train/start.hpp: weights in the compute dtype, masters behind what rounding changes. Valid as long as
/// `setup`, whose recipe knows its clusters.
StepZero step_zero_of(const RunConfig&, const Setup& setup);

/// **Collective** over `world`. Writes `step` as checkpoint `folder`, each rank blocks of its own, in memory for a few blocks; the bytes of
/// tensors are those that add_snapshot gives for a model filled with them, on any number of ranks. A value that bf16 can't hold is
/// looked for first, parameter by parameter, up to the first.
/// What an attempt of the same `identity` left in <folder>.partial is verified and kept. `alive` is called after each block.
/// Returns bytes of tensors. Throws UserError on all ranks when the disk is full.
uint64_t write_step_zero(const StepZero& step, const std::filesystem::path& folder, Manifest manifest,
                         const std::map<std::string, std::string>& texts, const Communicator& world, const std::string& identity,
                         const CheckpointSection& settings, const std::function<void()>& alive = [] {});

/// Bytes of tensors that write_step_zero may write: masters may turn out to be needless.
uint64_t most_bytes(const StepZero& step);

/// What of a run decides the tensors of its step 0, in words: files of the sources with samples of their bytes, recipe, precision, seed.
/// Of a whole run that grows, or, where `as_stored`, of its source alone.
std::string identity_of_step_zero(const RunConfig&, const Setup&, bool as_stored);

/// The manifest of a run's step 0; without run_id's random part where the caller sets its own.
Manifest manifest_of_step_zero(const RunConfig&, const Setup&, int ranks);

/// Whether `train` has nothing to do for this run but to store step 0, and needs no model for it: no steps, no certificate, no
/// validation, no checkpoint to go on from.
bool only_stores_step_zero(const RunConfig&, const Setup&);
/// **Collective** over `world`. Does that, and returns the folder. `alive` is told what goes on.
std::filesystem::path store_step_zero(const RunConfig&, Setup&, const Communicator& world, const std::function<void(const char* doing)>& alive);

}  // namespace upcycle
