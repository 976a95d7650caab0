#pragma once
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// Every way to lay out `world` ranks, each once: all degrees of tensor, context, pipeline, expert and expert_tensor that a Grid of
/// `world` ranks takes (data and expert_data are what remains), each with zero 0 and 1, and with 1 and 2 virtual stages where there is
/// a pipeline to interleave. A model, a batch or a sequence may still refuse a layout. Pure.
std::vector<ParallelSection> every_layout(int world);

}  // namespace upcycle
