#pragma once
#include <functional>

#include "upcycle/grow.hpp"

namespace upcycle {

/// Sees an expert's slice of the source from its first to its last row: (first row, fp32 rows).
using SeeRows = std::function<void(int64_t first, const Tensor& rows)>;
using ShowSlice = std::function<void(const SeeRows&)>;

/// Noise and drop of the part `box` of the expert of `facts`; `target` (CPU, fp32, two-dimensional) has the dense values of `box`, not yet
/// times the recipe's factor. Hidden units lie along `unit_dim` of the expert's matrix, 0 or 1. `slice` is asked for where the statistics
/// in `facts` are not known yet.
void disturb(const ParameterSpec& spec, const Box& box, int64_t unit_dim, const Recipe& recipe, const ShowSlice& slice, const Tensor& target,
             ExpertFacts& facts);

}  // namespace upcycle
