#pragma once
#include "base/rng.hpp"
#include "base/tensor.hpp"

namespace upcycle {

/// Random numbers made where they are needed: fp32 [T, width], uniform in [0, 1), multiples of 2^-24, on the device of `index_T`.
/// Row t is a pure function of (random, index_T[t], width): the upper 24 bits of the words of blocks index * ceil(width / 4), ...
Tensor uniform(const Random& random, const Tensor& index_T, int64_t width);

}  // namespace upcycle
