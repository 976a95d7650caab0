#pragma once
#include <filesystem>

#include "base/watchdog.hpp"
#include "config/run_config.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

/// **Collective** over the world. Does what the run file says, from its newest checkpoint or from step 0, to the end or to the
/// request to stop: kExitDone or kExitRequeue. Throws UserError before anything is allocated or written when something about the run is
/// wrong; `accept_changes`: not when what it computes was changed since that checkpoint. A checkpoint whose values turn out damaged while
/// they are read is renamed, and the run goes on from the one before it; the only one stays where it is, and is a UserError.
/// `profile`: the file of StepTrace.
int run_training(const RunConfig&, Mesh&, Watchdog&, bool accept_changes, const std::filesystem::path& profile);

}  // namespace upcycle
