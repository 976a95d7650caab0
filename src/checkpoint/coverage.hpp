#pragma once
#include <span>
#include <string>
#include <vector>

#include "checkpoint/piece.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {

/// What a rank is about to write, without the values: a line of text that travels between ranks.
std::string declare(std::span<const Piece> pieces);

/// The tensors that all ranks' declarations together make up, by name. Throws std::logic_error naming the tensor (and
/// ranks) when a box lies outside its tensor, shapes or dtypes disagree, boxes overlap or leave something out, or a
/// name is impossible: then the program is wrong, not its user. All ranks come to the same verdict from the same
/// declarations.
std::vector<TensorSpec> check_coverage(std::span<const std::string> declarations);

}  // namespace upcycle
