#pragma once
#include "data/sampler.hpp"

namespace upcycle {

/// The positions of `batch` that context rank `rank` of `ranks` holds (see zigzag.hpp): all of its tensors alike, [B, S / ranks].
/// Starts go on naming places in the whole sequence.
Batch of_context_rank(const Batch& batch, int ranks, int rank);

}  // namespace upcycle
