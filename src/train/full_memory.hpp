#pragma once
#include <string>

#include "config/architecture.hpp"
#include "config/run_config.hpp"
#include "model/layout.hpp"

namespace upcycle {

/// What to say when a GPU's memory is full: what `rank` was planned to take (memory_plan.hpp), kind by kind, of the GPU's `available` bytes,
/// and which changes to the run file take less, each alone: train.recompute, train.micro_batch, more ranks along an axis. Pure. `why`: the
/// allocator's own words.
std::string memory_is_full(const Architecture&, const RunConfig&, const Layout&, int rank, int64_t available, const std::string& why);

}  // namespace upcycle
