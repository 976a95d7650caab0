#pragma once
#include "ops/rope.hpp"

namespace upcycle {

/// Where the token rows of a micro-batch stand: what attention needs to know of them beside their values.
/// Rows are B sequences after one another; rank t of the tensor group holds the t-th of equal slices of them between two layers
/// (sequence parallelism), and all of them inside attention and the feed-forward.
struct Positions {
  int64_t sequences = 0;   ///< B
  RotaryTable rotary;      ///< of the positions of one sequence
};

}  // namespace upcycle
