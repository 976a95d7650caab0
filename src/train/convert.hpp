#pragma once
#include <filesystem>

#include "config/run_config.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// **Collective** over `world`. Writes the Hugging Face directory [source] model, as it is, as checkpoint step-00000000 of the run
/// directory, in the dtype that it is stored in (fp16, which checkpoints do not have, and routers become fp32: nothing is rounded).
/// Bytes go from the mapped files to the checkpoint; no rank holds the model, except its share of an fp16 one. Returns the folder.
/// Throws UserError for a source that is none or damaged, a run directory that belongs to another run or has a checkpoint, too
/// little space.
std::filesystem::path convert_to_checkpoint(const RunConfig& run, const Communicator& world);

}  // namespace upcycle
