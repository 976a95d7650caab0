#pragma once
#include "model/key_values.hpp"
#include "ops/rope.hpp"
#include "ops/segments.hpp"
#include "parallel/zigzag.hpp"

namespace upcycle {

/// Where the token rows of a micro-batch stand: what attention needs to know of them beside their values.
/// Rows are B sequences after one another, of each the positions that this context rank holds (zigzag.hpp); rank t of the tensor
/// group holds the t-th of equal slices of them between two layers (sequence parallelism), and all of them inside attention and the
/// feed-forward.
struct Positions {
  int64_t sequences = 0;   ///< B
  RotaryTable rotary;      ///< of the positions of one sequence that are held here
  Segments segments;       ///< which keys of the whole sequences the queries held here see
  KeyValues* before = nullptr;   ///< the keys and values of the positions in front, to which those of these rows are added
};

/// What the queries at the positions `held` of a sequence see: all up to themselves, or only from `starts`[i] on, the first position
/// of the document that the i-th of them is in (null: borders don't matter). Documents, and stretches, become segments.
std::vector<Segment> segments_of(const std::vector<Stretch>& held, const int64_t* starts);

/// The same for B sequences of `length`; starts on the host, int64 [B, positions held], or undefined. Plain where that says it all.
Segments segments_of(int64_t sequences, int64_t length, const std::vector<Stretch>& held, const Tensor& starts_BC,
                     at::Device device);

}  // namespace upcycle
