#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "config/architecture.hpp"
#include "config/run_config.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

/// What one rank takes while it trains, in bytes. Weights, masters, gradients and moments follow from the catalogue and are exact.
struct RankMemory {
  int stage = 0;
  int rank = 0;                    ///< one rank of this kind: the stage's largest
  int64_t parameters = 0;
  int64_t weights = 0;             ///< in the compute dtype; routers fp32
  int64_t masters = 0;             ///< fp32, of weights that are not fp32 themselves
  int64_t gradients = 0;           ///< fp32
  int64_t moments = 0;             ///< two, fp32
  double in_flight = 0;            ///< micro-batches whose activations are kept at once; 1.5: one, and another's half of the chunks
  int64_t activations = 0;         ///< what backward keeps (saved.cpp), balanced experts, all micro-batches in flight
  int64_t buffers = 0;             ///< the most on top at any moment: a layer that is computed anew, temporaries, messages
  /// CUDA context, cuBLAS workspaces, NCCL's channels and the allocator's gaps: an allowance, not computed.
  int64_t libraries = kLibraries;
  static constexpr int64_t kLibraries = 2'000'000'000;

  /// What device::memory counts as used.
  int64_t tensors() const { return weights + masters + gradients + moments + activations + buffers; }
  int64_t total() const { return tensors() + libraries; }
};

/// The memory of rank `rank` of `layout`. With zero = 1, masters and moments are cut over the ranks that hold the same slice.
RankMemory rank_memory(const Architecture&, const RunConfig&, const Layout&, int rank);

/// The largest rank of every pipeline stage. Pure.
std::vector<RankMemory> plan_memory(const Architecture&, const RunConfig&, const Layout&);

/// The largest of these.
const RankMemory& largest(const std::vector<RankMemory>&);

}  // namespace upcycle
