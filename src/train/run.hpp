#pragma once
#include "base/watchdog.hpp"
#include "config/run_config.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

/// Exit codes of a run.
inline constexpr int kDone = 0;
inline constexpr int kRequeue = 75;   ///< stopped on request, state saved: run me again

/// **Collective** over the world. Does what the run file says, from its newest checkpoint or from step 0, to the end or to the
/// request to stop. Throws UserError before anything is allocated or written when something about the run is wrong.
int run_training(const RunConfig&, Mesh&, Watchdog&);

}  // namespace upcycle
