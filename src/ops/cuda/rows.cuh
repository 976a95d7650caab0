// Rows of numbers on a GPU: some at a time, 16 bytes of them where they fit.
#pragma once
#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {

/// Some numbers side by side; up to 16 bytes move in one instruction.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Lanes {
  T lane[count];
};
template <typename T>
inline constexpr int kVectorLanes = 16 / static_cast<int>(sizeof(T));

/// Whether rows of `row_bytes` from `first` on all begin at a multiple of 16 bytes.
inline bool in_vectors(const void* first, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && row_bytes % 16 == 0;
}

/// n / by for n < 2^31, by a product instead of a division (Granlund and Montgomery, PLDI 1994). 1 <= by < 2^31.
class Division {
 public:
  explicit Division(uint32_t by) : by_(by) {
    while ((uint64_t{1} << shift_) < by) ++shift_;
    factor_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - by) << 32) / by + 1);
  }
  __device__ __forceinline__ uint32_t of(uint32_t n) const { return (__umulhi(n, factor_) + n) >> shift_; }
  __device__ __forceinline__ uint32_t by() const { return by_; }

 private:
  uint32_t by_, factor_, shift_ = 0;
};

}  // namespace upcycle::cuda
