#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/piece.hpp"
#include "checkpoint/tensor_spec.hpp"

namespace upcycle {

/// What a rank is about to write, without the values: a line of text that travels between ranks. Throws std::logic_error for a piece
/// whose tensor has not its box's size.
std::string declare(std::span<const Piece> pieces);

/// Who writes what of one file. Every block of every tensor is written, and its checksum owned, by one rank, one of those that hold
/// most of it; the others send it theirs.
struct WritePlan {
  /// A box of a block's tensor, one run of elements of the block or some columns of one, and the rank whose values are taken.
  struct Part {
    int rank;
    Box box;
  };
  struct Block {
    size_t tensor;   ///< index into `tensors`
    int64_t number;  ///< of Blocks(tensor)
    int writer;
    std::vector<Part> parts;   ///< in row-major order of their first element
    bool travels() const;      ///< some part is another rank's
  };
  std::vector<TensorSpec> tensors;   ///< by name
  std::vector<Block> blocks;         ///< of tensors[0], tensors[1], ...; all of them, in order
};

/// The plan for all ranks' declarations: pure, the same on all ranks. Equal boxes of several ranks are replicas, of which one is written;
/// work is spread over those that could do it. Throws std::logic_error naming the tensor (and ranks) when a box lies outside its
/// tensor, shapes or dtypes disagree, boxes overlap without being equal or leave something out, or a name is impossible: then the
/// program is wrong, not its user.
WritePlan plan_writes(std::span<const std::string> declarations);

/// Blocks that travel, in rounds in which no rank sends or receives more than `bytes` (unless one block is larger): indices into
/// plan.blocks.
std::vector<std::vector<size_t>> rounds(const WritePlan& plan, int64_t bytes);

}  // namespace upcycle
