#pragma once
#include <type_traits>

#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {

/// 16 bytes of T, read and written in one instruction, that stay four registers as long as they are kept: of a Vector of bf16 the compiler
/// makes eight. The address must be a multiple of 16 bytes.
template <typename T>
struct Packed {
  static constexpr int kLanes = 16 / sizeof(T);
  uint32_t word[4];

  /// The `index`-th 16 bytes of what begins at `from`.
  static __device__ __forceinline__ Packed read(const void* from, int64_t index = 0) {
    const uint4 w = static_cast<const uint4*>(from)[index];
    return {w.x, w.y, w.z, w.w};
  }
  __device__ __forceinline__ void write(void* to, int64_t index = 0) const {
    __stwb(static_cast<uint4*>(to) + index, make_uint4(word[0], word[1], word[2], word[3]));   // an assignment may become four
  }

  __device__ __forceinline__ float operator[](int lane) const {
    if constexpr (std::is_same_v<T, float>) return __uint_as_float(word[lane]);
    // The upper half of an fp32 number is the bf16 number.
    else return __uint_as_float(lane % 2 == 0 ? word[lane / 2] << 16 : word[lane / 2] & 0xffff0000u);
  }
  /// The numbers, rounded to T.
  static __device__ __forceinline__ Packed of(const float (&x)[kLanes]) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        packed.word[i] = __float_as_uint(x[i]);
      } else {
        const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        packed.word[i] = static_cast<uint32_t>(__bfloat16_as_ushort(two.y)) << 16 | __bfloat16_as_ushort(two.x);
      }
    }
    return packed;
  }
};

}  // namespace upcycle::cuda
