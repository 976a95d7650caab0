#pragma once
#include <cstdint>
#include <vector>

#include "config/architecture.hpp"
#include "config/run_config.hpp"
#include "parallel/grid.hpp"

namespace upcycle {

/// How large one micro-batch is on a rank, experts in balance.
struct MicroBatch {
  MicroBatch(const Architecture&, const RunConfig&, const Grid&);
  int64_t width;       ///< bytes of a number in the compute dtype
  int64_t own;         ///< rows between layers: B * S / (CP * TP)
  int64_t gathered;    ///< rows inside attention, dense feed-forwards and the head: own * TP
  int64_t keys;        ///< rows of keys and values that attention sees: gathered * CP
  int64_t routed;      ///< rows in this rank's experts: own * K * ETP
};

/// Something that backward keeps of a layer, or of the ends of the model.
struct Saved {
  const char* what;
  int64_t bytes;       ///< of one micro-batch
  Recompute until;     ///< the strongest train.recompute with which it is still kept
};

/// The one table of what the operations of model/, moe/ and ops/ keep for backward.
std::vector<Saved> saved_by_layer(const Architecture&, const RunConfig&, const Grid&, int64_t layer);
std::vector<Saved> saved_by_head(const Architecture&, const RunConfig&, const Grid&);

int64_t saved_bytes(const std::vector<Saved>&, Recompute);

/// The most that forward and backward take besides what is kept while they are in a layer, in the head with the loss, and in the
/// embedding: intermediate results, gradients of activations, and weight gradients on their way into the fp32 sum.
int64_t passing_in_layer(const Architecture&, const RunConfig&, const Grid&, int64_t layer);
int64_t passing_in_head(const Architecture&, const RunConfig&, const Grid&);
int64_t passing_in_embedding(const Architecture&, const RunConfig&, const Grid&);

}  // namespace upcycle
