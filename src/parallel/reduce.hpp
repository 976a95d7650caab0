#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <span>

#include "parallel/communicator.hpp"

namespace upcycle {

/// True for the dtypes that can be reduced: float32, float64, bfloat16, float16, int32, int64.
bool reducible(at::ScalarType) noexcept;

/// out[i] = parts[0][i] (+) parts[1][i] (+) ..., always in this order, so that the bits depend on nothing else.
/// bf16 and fp16 are summed in fp32 and rounded once. `out` may be one of the parts.
void reduce_in_order(std::span<const std::byte* const> parts, std::byte* out, int64_t count, at::ScalarType, Reduce);

}  // namespace upcycle
