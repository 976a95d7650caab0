#pragma once
#include <string>

#include "checkpoint/reader.hpp"

namespace upcycle {

/// XXH3-128, in hex, of everything a checkpoint's tensor files say: file, name, dtype, shape and bytes of every tensor,
/// in the order of the names. Two checkpoints of the same state have the same digest, however they were laid out and
/// written. Reads all of it, in bounded memory.
std::string digest(const CheckpointReader&);

}  // namespace upcycle
