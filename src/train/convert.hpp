#pragma once
#include <filesystem>
#include <functional>

#include "config/run_config.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// **Collective** over `world`. Writes checkpoint step-00000000 of the run directory, block by block: no rank holds the model, or more
/// than some tens of MiB of it, and the bytes of tensors do not depend on the number of ranks.
/// Where [moe] asks for experts that [source] has not: what `train` stores as step 0 (weights in the compute dtype, masters of what
/// rounding changes, moments that are carried over), grown by the run's recipe. With upcycle.certify every value is held against the
/// source before it is written; models are not run: manifest.json says "certificate": "weights", and there is no certificate.json.
/// Otherwise the Hugging Face directory [source] model as it is, in the dtype that it is stored in (fp16, which checkpoints do not have,
/// and routers become fp32: nothing is rounded).
/// After an interruption the same call goes on: blocks that are on the disk are verified and kept. Returns the folder. `alive` is called
/// now and then. Throws UserError for a source that is none or damaged, a run directory that belongs to another run or has a checkpoint,
/// too little space.
std::filesystem::path convert_to_checkpoint(const RunConfig& run, const Communicator& world, const std::function<void()>& alive = [] {});

}  // namespace upcycle
