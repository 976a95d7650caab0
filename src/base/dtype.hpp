#pragma once
#include <c10/core/ScalarType.h>

#include <string>
#include <string_view>

namespace upcycle {

/// Floating-point dtypes of weights: float32, bfloat16, float16. Names as config.json and run files write them.
/// Throws UserError on an unknown name ("bf16", "bfloat16", "BF16" are all bfloat16; likewise the others).
at::ScalarType dtype_from_name(std::string_view name);

/// "float32", "bfloat16", "float16" (config.json, manifests).
std::string long_name(at::ScalarType dtype);

}  // namespace upcycle
