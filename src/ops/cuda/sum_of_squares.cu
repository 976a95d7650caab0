#include <algorithm>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/sum_of_squares.hpp"

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kAhead = 4;   // loads of a thread on their way at once

/// Thread 0 gets the sum of the block's numbers.
__device__ double block_total(double x) {
  __shared__ double shared[kThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) x += shared[warp];
  }
  return x;
}

__device__ __forceinline__ double squares(const float4& x) {
  return static_cast<double>(fmaf(x.x, x.x, x.y * x.y) + fmaf(x.z, x.z, x.w * x.w));
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) square_kernel(SquareSums p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads, thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t vectors = kAligned ? p.size / 4 : 0;
  double sum = 0.0;
  for (int64_t first = thread; first < vectors; first += kAhead * threads) {
    float4 x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t i = first + j * threads;
      x[j] = i < vectors ? __ldcs(reinterpret_cast<const float4*>(p.x) + i) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum += squares(x[j]);
  }
  for (int64_t i = 4 * vectors + thread; i < p.size; i += threads) sum += static_cast<double>(p.x[i] * p.x[i]);
  sum = block_total(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum * p.share;
}

}  // namespace

int square_sum_blocks(int64_t size) {
  return static_cast<int>(std::clamp<int64_t>(size / (4 * kAhead * kThreads), 1, 528));   // four on each of an H100's processors
}

void sum_squares(const SquareSums& p, CUstream_st* stream) {
  const int blocks = square_sum_blocks(p.size);
  reinterpret_cast<uintptr_t>(p.x) % 16 == 0 ? square_kernel<true><<<blocks, kThreads, 0, stream>>>(p)
                                             : square_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
  check_launch("sum of squares");
}

}  // namespace upcycle::cuda
