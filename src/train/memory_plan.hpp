#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "config/architecture.hpp"
#include "config/run_config.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

/// What one rank keeps while it trains, in bytes. All but `activations` follows from the catalogue and is exact; what libraries
/// take for themselves (CUDA context, communication buffers, allocator's rounding) is not in it.
struct RankMemory {
  int stage = 0;
  int rank = 0;                    ///< one rank of this kind: the stage's largest
  int64_t parameters = 0;
  int64_t weights = 0;             ///< in the compute dtype; routers fp32
  int64_t masters = 0;             ///< fp32, of weights that are not fp32 themselves
  int64_t gradients = 0;           ///< fp32
  int64_t moments = 0;             ///< two, fp32
  int64_t activations = 0;         ///< estimate: what backward keeps, balanced experts, all micro-batches in flight
  int64_t total() const { return weights + masters + gradients + moments + activations; }
};

/// The memory of rank `rank` of `layout`. With zero = 1, masters and moments are cut over the ranks that hold the same slice.
RankMemory rank_memory(const Architecture&, const RunConfig&, const Layout&, int rank);

/// The largest rank of every pipeline stage. Pure.
std::vector<RankMemory> plan_memory(const Architecture&, const RunConfig&, const Layout&);

}  // namespace upcycle
