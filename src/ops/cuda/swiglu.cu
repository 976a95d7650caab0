// One pass each. Bytes moved for R rows of F numbers of w bytes: forward 3 R F w, backward 5 R F w.
#include "ops/cuda/swiglu.hpp"

#include "ops/cuda/rows.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 128;

// 1 / (1 + exp(-x)). With the fast functions an error of some 2^-21, far below bf16's 2^-9; fp32 takes the exact ones.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  } else {
    return 1.0f / (1.0f + expf(-x));
  }
}

// A row is one warp's, or one block's. Rows of a block's are few enough per wave that none of the last wave's threads wait long.
template <int kWarps>
__device__ __forceinline__ int64_t row_here() {
  return int64_t{blockIdx.x} * (kThreads / (32 * kWarps)) + threadIdx.x / (32 * kWarps);
}

template <typename T, int kLanes, int kWarps>
__global__ void __launch_bounds__(kThreads) forward_kernel(Swiglu s) {
  using Numbers = Lanes<T, kLanes>;
  const int64_t row = row_here<kWarps>();
  if (row >= s.rows) return;
  const T* const __restrict__ gate = static_cast<const T*>(s.gate_up) + row * 2 * s.width;
  const T* const __restrict__ up = gate + s.width;
  T* const __restrict__ product = static_cast<T*>(s.product) + row * s.width;
  const float weight = s.weight ? s.weight[row] : 1.0f;
#pragma unroll 2
  for (int64_t f = threadIdx.x % (32 * kWarps) * kLanes; f < s.width; f += 32 * kWarps * kLanes) {
    const Numbers g = *reinterpret_cast<const Numbers*>(gate + f), u = *reinterpret_cast<const Numbers*>(up + f);
    Numbers out;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float x = as_float(g.lane[i]);
      out.lane[i] = rounded<T>(x * sigmoid<T>(x) * as_float(u.lane[i]) * weight);
    }
    *reinterpret_cast<Numbers*>(product + f) = out;
  }
}

// d silu(x) / dx = s + x s (1 - s) with s = sigmoid(x)
template <typename T, int kLanes, int kWarps>
__global__ void __launch_bounds__(kThreads) backward_kernel(SwigluBackward s) {
  using Numbers = Lanes<T, kLanes>;
  __shared__ float shared[32];
  const int64_t row = row_here<kWarps>();
  if (row >= s.rows) return;   // whole warps, and whole blocks where the block has one row
  const int first = threadIdx.x % (32 * kWarps);
  const T* const __restrict__ gate = static_cast<const T*>(s.gate_up) + row * 2 * s.width;
  const T* const __restrict__ up = gate + s.width;
  const T* const __restrict__ d_product = static_cast<const T*>(s.d_product) + row * s.width;
  T* const __restrict__ d_gate = static_cast<T*>(s.d_gate_up) + row * 2 * s.width;
  T* const __restrict__ d_up = d_gate + s.width;
  const float weight = s.weight ? s.weight[row] : 1.0f;
  float d_weight = 0.0f;
  for (int64_t f = first * kLanes; f < s.width; f += 32 * kWarps * kLanes) {
    const Numbers g = *reinterpret_cast<const Numbers*>(gate + f), u = *reinterpret_cast<const Numbers*>(up + f);
    const Numbers d = *reinterpret_cast<const Numbers*>(d_product + f);
    Numbers of_gate, of_up;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float x = as_float(g.lane[i]), y = as_float(u.lane[i]), dz = as_float(d.lane[i]);
      const float sigma = sigmoid<T>(x), silu = x * sigma, weighed = dz * weight;
      d_weight += dz * silu * y;
      of_up.lane[i] = rounded<T>(weighed * silu);
      of_gate.lane[i] = rounded<T>(weighed * y * (sigma + silu * (1.0f - sigma)));
    }
    *reinterpret_cast<Numbers*>(d_gate + f) = of_gate;
    *reinterpret_cast<Numbers*>(d_up + f) = of_up;
  }
  if (s.d_weight) {
    d_weight = kWarps == 1 ? warp_sum(d_weight) : block_sum(d_weight, shared);
    if (first == 0) s.d_weight[row] = d_weight;
  }
}

// Short rows: a warp each, so that few threads idle.
template <typename T, int kLanes, class Launch>
void by_width(int64_t width, Launch&& launch) {
  if (width <= 32 * 8 * kLanes) {
    launch.template operator()<T, kLanes, 1>();
  } else {
    launch.template operator()<T, kLanes, kThreads / 32>();
  }
}

template <class Launch>
void by_kind(bool bf16, bool vectors, int64_t width, Launch&& launch) {
  using Half = __nv_bfloat16;
  if (bf16 && vectors) by_width<Half, kVectorLanes<Half>>(width, launch);
  if (bf16 && !vectors) by_width<Half, 1>(width, launch);
  if (!bf16 && vectors) by_width<float, kVectorLanes<float>>(width, launch);
  if (!bf16 && !vectors) by_width<float, 1>(width, launch);
}

template <int kWarps>
int blocks_for(int64_t rows) {
  return blocks_of(rows, kThreads / (32 * kWarps));
}

}  // namespace

void swiglu(const Swiglu& s, CUstream_st* stream) {
  if (s.rows * s.width == 0) return;
  const int64_t row_bytes = s.width * (s.bf16 ? 2 : 4);
  const bool vectors = in_vectors(s.gate_up, row_bytes) && in_vectors(s.product, row_bytes);
  by_kind(s.bf16, vectors, s.width, [&]<typename T, int kLanes, int kWarps>() {
    forward_kernel<T, kLanes, kWarps><<<blocks_for<kWarps>(s.rows), kThreads, 0, stream>>>(s);
  });
  check_launch("swiglu");
}

void swiglu_backward(const SwigluBackward& s, CUstream_st* stream) {
  if (s.rows * s.width == 0) return;
  const int64_t row_bytes = s.width * (s.bf16 ? 2 : 4);
  const bool vectors = in_vectors(s.gate_up, row_bytes) && in_vectors(s.d_product, row_bytes) && in_vectors(s.d_gate_up, row_bytes);
  by_kind(s.bf16, vectors, s.width, [&]<typename T, int kLanes, int kWarps>() {
    backward_kernel<T, kLanes, kWarps><<<blocks_for<kWarps>(s.rows), kThreads, 0, stream>>>(s);
  });
  check_launch("swiglu_backward");
}

}  // namespace upcycle::cuda
