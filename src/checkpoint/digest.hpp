#pragma once
#include <functional>
#include <string>

#include "checkpoint/reader.hpp"

namespace upcycle {

/// XXH3-128, in hex, of everything a checkpoint's tensor files say: file, name, dtype, shape and bytes of every tensor,
/// in the order of the names. Two checkpoints of the same state have the same digest, however they were laid out and
/// written. Reads all of it, once, in bounded memory; `also` sees what
/// passes by: every tensor in turn, in 1-d parts of its stored dtype.
using SeePart = std::function<void(const std::string& file, const std::string& name, const Tensor& part)>;
std::string digest(const CheckpointReader&, const SeePart& also = {});

}  // namespace upcycle
