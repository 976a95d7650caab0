#pragma once
#include <ATen/core/Tensor.h>

#include <cstring>

namespace upcycle {

/// Equal down to the last bit (NaNs and signed zeros included), dtype and shape, too.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

}  // namespace upcycle
