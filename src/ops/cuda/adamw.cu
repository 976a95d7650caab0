// The formula is at::_fused_adamw_'s (ATen/native/cuda/fused_adam_utils.cuh), operation by operation, so that the numbers are the same.
#include <cmath>

#include "ops/cuda/adamw.hpp"
#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;                      // of a thread
constexpr int kBlock = kThreads * kVectors * 4;  // elements

/// What one number is multiplied with, the same for all of a stretch.
struct Factors {
  float lr, decay;
};

/// What all threads of a block need, found by its first one while the numbers are on their way.
struct Step {
  float divisor, bias1, bias2_root;
  int stretch;   ///< of the block's first element
  bool skip;
};

__device__ __forceinline__ void update(float& master, float gradient, float& m, float& v, const Step& s, const Factors& f, float beta1,
                                       float beta2, float eps) {
  const float g = gradient / s.divisor;
  if (f.decay != 0) master -= f.lr * f.decay * master;
  m = std::fma(beta1, m, std::fma(-beta1, g, g));
  v = std::fma(beta2, v, std::fma(-beta2, g * g, g * g));
  const float step_size = f.lr / s.bias1;
  const float denominator = (std::sqrt(v) / s.bias2_root) + eps;
  master -= step_size * m / denominator;
}

template <bool kAligned>
__device__ __forceinline__ Vector<float> load(const float* x, int64_t i, int64_t size) {
  Vector<float> out;
  if constexpr (kAligned) {
    if (i + 4 <= size) {
      *reinterpret_cast<float4*>(&out) = __ldcs(reinterpret_cast<const float4*>(x + i));
      return out;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) out.lane[k] = i + k < size ? x[i + k] : 0.0f;
  return out;
}

template <bool kAligned>
__device__ __forceinline__ void store(float* x, int64_t i, int64_t size, const Vector<float>& in) {
  if constexpr (kAligned) {
    if (i + 4 <= size) {
      __stcs(reinterpret_cast<float4*>(x + i), *reinterpret_cast<const float4*>(&in));
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (i + k < size) x[i + k] = in.lane[k];
  }
}

template <bool kAligned>
__device__ __forceinline__ void store(__nv_bfloat16* x, int64_t i, int64_t size, const Vector<float>& in) {
  alignas(8) __nv_bfloat16 values[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) values[k] = rounded<__nv_bfloat16>(in.lane[k]);
  if constexpr (kAligned) {
    if (i + 4 <= size) {
      *reinterpret_cast<uint2*>(x + i) = *reinterpret_cast<const uint2*>(values);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (i + k < size) x[i + k] = values[k];
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamW p) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlock;
  const auto at = [&](int j) { return begin + (j * kThreads + threadIdx.x) * int64_t{4}; };
  Vector<float> gradient[kVectors], master[kVectors], m[kVectors], v[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    gradient[j] = load<kAligned>(p.gradients, at(j), p.size);
    master[j] = load<kAligned>(p.masters, at(j), p.size);
    m[j] = load<kAligned>(p.exp_avg, at(j), p.size);
    v[j] = load<kAligned>(p.exp_avg_sq, at(j), p.size);
  }

  const float beta1 = static_cast<float>(p.beta1), beta2 = static_cast<float>(p.beta2), eps = static_cast<float>(p.eps);
  __shared__ Step shared;
  if (threadIdx.x == 0) {
    const float step = *p.step;
    shared.skip = *p.skip == 1;
    shared.divisor = *p.divisor;
    shared.bias1 = 1 - std::pow(beta1, step);
    shared.bias2_root = std::sqrt(1 - std::pow(beta2, step));
    int low = 0, high = p.num_stretches;   // the last stretch that begins at or before `begin`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (p.stretches[3 * middle] <= static_cast<double>(begin) ? low : high) = middle;
    }
    shared.stretch = low;
  }
  __syncthreads();
  const Step s = shared;
  if (s.skip) return;

  int stretch = s.stretch;
  const auto end_of = [&] {
    return stretch + 1 < p.num_stretches ? static_cast<int64_t>(p.stretches[3 * (stretch + 1)]) : p.size;
  };
  const auto factors_of = [&] {
    return Factors{static_cast<float>(p.lr * p.stretches[3 * stretch + 1]), static_cast<float>(p.weight_decay * p.stretches[3 * stretch + 2])};
  };
  int64_t end = end_of();
  Factors factors = factors_of();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int64_t i = at(j);
    if (i >= p.size) break;
    if (i >= end) {
      do {
        ++stretch;
        end = end_of();
      } while (i >= end);
      factors = factors_of();
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      update(master[j].lane[k], gradient[j].lane[k], m[j].lane[k], v[j].lane[k], s, factors, beta1, beta2, eps);
    }
    store<kAligned>(p.masters, i, p.size, master[j]);
    store<kAligned>(p.exp_avg, i, p.size, m[j]);
    store<kAligned>(p.exp_avg_sq, i, p.size, v[j]);
    if (p.values) store<kAligned>(static_cast<__nv_bfloat16*>(p.values), i, p.size, master[j]);
  }
}

}  // namespace

void adamw(const AdamW& p, CUstream_st* stream) {
  if (p.size == 0) return;
  const auto multiple = [](const void* pointer, uintptr_t of) { return reinterpret_cast<uintptr_t>(pointer) % of == 0; };
  const bool aligned = multiple(p.masters, 16) && multiple(p.gradients, 16) && multiple(p.exp_avg, 16) && multiple(p.exp_avg_sq, 16) && multiple(p.values, 8);
  const int blocks = blocks_of(p.size, kBlock);
  aligned ? adamw_kernel<true><<<blocks, kThreads, 0, stream>>>(p) : adamw_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
  check_launch("adamw");
}

}  // namespace upcycle::cuda
