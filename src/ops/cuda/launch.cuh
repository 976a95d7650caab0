// What every kernel file needs: the launch's error, numbers in bf16 and fp32, sums over a warp and a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace upcycle::cuda {

/// Throws when the last launch was refused (a shape or size that the hardware can't take): nothing has run then.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

/// 16 bytes of T, read and written in one instruction. The address must be a multiple of 16 bytes.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
};

template <typename T>
__device__ __forceinline__ float as_float(T x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ float as_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename T>
__device__ __forceinline__ T rounded(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded(float x) {
  return __float2bfloat16_rn(x);
}

/// All lanes get the sum of the warp's 32 numbers; always in the same order.
__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

/// All threads of the block get the sum of its numbers, always in the same order. `shared` holds 32 floats; call it with all threads.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  const int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  x = warp_sum(x);
  if (warps == 1) return x;
  __syncthreads();   // the last use of `shared` is over
  if (threadIdx.x % 32 == 0) shared[warp] = x;
  __syncthreads();
  x = static_cast<int>(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : 0.0f;
  return warp_sum(x);
}

inline int blocks_of(int64_t elements, int threads) { return static_cast<int>((elements + threads - 1) / threads); }

}  // namespace upcycle::cuda
