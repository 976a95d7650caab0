#include "base/dtype.hpp"

#include "base/error.hpp"

namespace upcycle {

at::ScalarType dtype_from_name(std::string_view name) {
  if (name == "float32" || name == "fp32" || name == "F32") return at::kFloat;
  if (name == "bfloat16" || name == "bf16" || name == "BF16") return at::kBFloat16;
  if (name == "float16" || name == "fp16" || name == "F16") return at::kHalf;
  fail("unknown dtype '", name, "': float32, bfloat16 and float16 are read");
}

std::string long_name(at::ScalarType dtype) {
  if (dtype == at::kFloat) return "float32";
  if (dtype == at::kBFloat16) return "bfloat16";
  if (dtype == at::kHalf) return "float16";
  return c10::toString(dtype);
}

}  // namespace upcycle
