#pragma once
#include <vector>

#include "base/tensor.hpp"

// Shapes: B sequences, S positions of a sequence, C of them on one context rank.
namespace upcycle {

/// Positions [begin, end) of a sequence.
struct Stretch {
  int64_t begin, end;
  int64_t size() const noexcept { return end - begin; }
  bool operator==(const Stretch&) const = default;
};

/// The positions that `rank` of `ranks` context ranks holds, in the order of its rows. Later queries see more keys; so the sequence
/// is cut into 2 * ranks equal chunks, and a rank gets one from the front and its mirror image from the back: the same work for all
/// (Llama 3, arXiv 2407.21783, section 3.3.2). One rank holds the whole. Throws std::logic_error unless 2 * ranks divides `length`.
std::vector<Stretch> zigzag(int64_t length, int ranks, int rank);

/// The columns of x [B, S, ...] that the rank holds: [B, C, ...].
Tensor take_zigzag(const Tensor& x_BS, int ranks, int rank);

/// Chunks from the order in which the ranks hold them to the sequence's: x [ranks, B, C, ...] -> [B, S, ...]; and back.
/// Nothing is recorded for autograd.
Tensor in_sequence_order(const Tensor& x_RBC);
Tensor in_rank_order(const Tensor& x_BS, int ranks);

}  // namespace upcycle
