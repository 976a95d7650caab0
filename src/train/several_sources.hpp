#pragma once
#include "train/dense_source.hpp"

namespace upcycle {

/// Throws UserError, naming both directories and every difference, unless two sources are models of one architecture with one
/// tokenizer (the same tokenizer.json, or none).
void check_same_kind(const WeightSource& first, const WeightSource& other);

/// Whether two sources are the same directory, or hold the same tensor files, byte by byte. Reads no further than to the first difference.
bool same_bytes(const WeightSource& first, const WeightSource& other);

}  // namespace upcycle
