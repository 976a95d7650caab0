#pragma once
#include <cstdint>

#include "base/tensor.hpp"

namespace upcycle {

/// True where a kernel that reads 16 bytes at a time can have `x`: on a GPU, in bf16 or fp32, rows one after another, from a multiple of
/// 16 bytes on. Whether a row is a whole number of vectors is for the kernel to say.
inline bool in_vectors(const Tensor& x) {
  const bool dtype = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat;
  return x.is_cuda() && dtype && x.is_contiguous() && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

/// The same numbers where a kernel can have them; a copy only where it must be.
inline Tensor as_vectors(const Tensor& x) { return in_vectors(x) ? x : x.clone(at::MemoryFormat::Contiguous); }

}  // namespace upcycle
