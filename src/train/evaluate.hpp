#pragma once
#include <c10/core/Device.h>

#include <filesystem>
#include <string>
#include <vector>

#include "config/run_config.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// One model's validation loss.
struct Evaluated {
  std::string model;               ///< "dense", "source" (a mixture itself), "step 0", "step 1200"
  std::filesystem::path folder;
  double loss = 0.0;               ///< nats a token
};

struct Evaluation {
  int64_t tokens = 0;              ///< that each of them predicted, and that count (those a loss mask names)
  std::vector<Evaluated> models;   ///< the run's source first, then checkpoints; the same on all ranks
};

/// What of a run there is to evaluate: its source, step 0 and its newest checkpoint, where they are there. Whole checkpoints only, so
/// a run may write while this reads.
/// Throws UserError when there is nothing, or run.directory belongs to a run of another source, [moe] or [upcycle].
std::vector<Evaluated> models_of(const RunConfig&);

/// **Collective** over the world. The mean validation loss of each of models_of (rank 0's word), what `train` says of the same weights: on
/// the run's validation stream, layout and precision; `batches` global batches. One model after the other is in memory, its values
/// alone. Writes nothing. Throws UserError on all ranks before anything is read when a model does not divide, or the data is wrong.
Evaluation evaluate(const RunConfig&, const Communicator& world, at::Device device, int64_t batches);

}  // namespace upcycle
