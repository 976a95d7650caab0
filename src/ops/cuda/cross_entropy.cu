// One block a row. A row of 151,936 bf16 logits is 297 KiB, more than shared memory holds: its first 3/4 stay there between the pass that
// finds largest and sum and the one that writes the gradient, the rest (10 MiB over all blocks at work) comes back from L2.
#include <algorithm>
#include <climits>

#include "ops/cuda/cross_entropy.hpp"
#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {
namespace {

enum class Pass { sums, gradient, both };

constexpr int kAhead = 4;              // loads of a thread on their way at once
constexpr float kLowest = -3.0e38f;    // finite, so that rows of -inf give no inf - inf on the way
constexpr int kStaticShared = 1024;    // room for what the kernel declares itself

__device__ __forceinline__ float exponential(float x, float) { return expf(x); }
__device__ __forceinline__ float exponential(float x, __nv_bfloat16) { return __expf(x); }   // 2^-21, of numbers rounded to 2^-9

/// Running largest and sum of exp(x - largest).
template <typename T>
struct Running {
  float largest = kLowest, sum = 0.0f;

  template <int kLanes>
  __device__ __forceinline__ void take(const T (&x)[kLanes]) {
    float top = as_float(x[0]);
#pragma unroll
    for (int lane = 1; lane < kLanes; ++lane) top = fmaxf(top, as_float(x[lane]));
    const float now = fmaxf(largest, top);
    sum *= exponential(largest - now, T());
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum += exponential(as_float(x[lane]) - now, T());
    largest = now;
  }

  /// All threads of the block get the whole row's.
  __device__ void over_block(float* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float top = warp_max(largest);
    if (lane == 0) shared[warp] = top;
    __syncthreads();
    top = warp_max(lane < warps ? shared[lane] : kLowest);
    sum = block_sum(sum * exponential(largest - top, T()), shared);
    largest = top;
  }
};

template <typename T, Pass kPass>
__global__ void __launch_bounds__(1024, 1) row_kernel(CrossEntropy p, int vectors, int kept) {
  using Lanes = Vector<T>;
  extern __shared__ uint4 shared_memory[];
  __shared__ float shared[32];
  Lanes* const keep = reinterpret_cast<Lanes*>(shared_memory);   // this thread reads only what it wrote itself
  const int64_t r = blockIdx.x;
  const int threads = blockDim.x, thread = threadIdx.x, columns = static_cast<int>(p.columns);
  T* const row = static_cast<T*>(p.logits) + r * p.stride;
  Lanes* const row_vectors = reinterpret_cast<Lanes*>(row);
  const int rest = vectors * Lanes::kLanes;   // from here on number by number
  const float weight = kPass == Pass::sums ? 1.0f : p.weights[r];

  const int64_t label64 = p.labels[r] - p.first;
  const bool here = label64 >= 0 && label64 < p.columns;
  const int label = here ? static_cast<int>(label64) : 0;
  const float label_logit = here ? as_float(row[label]) : 0.0f;   // before anything is written: a barrier follows

  Running<T> running;
  if constexpr (kPass != Pass::gradient) {
    for (int first = thread; first < vectors; first += kAhead * threads) {
      Lanes x[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = first + j * threads;
        if (i < vectors) x[j] = row_vectors[i];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = first + j * threads;
        if (i >= vectors) break;
        if (kPass == Pass::both && i < kept) keep[i] = x[j];
        running.take(x[j].lane);
      }
    }
    for (int i = rest + thread; i < columns; i += threads) {
      const T x[1] = {row[i]};
      running.take(x);
    }
    running.over_block(shared);
  } else {
    running.largest = p.largest[r], running.sum = p.sums[r];
    __syncthreads();
  }

  const float largest = running.largest, sum = running.sum;
  if constexpr (kPass == Pass::sums) {
    if (thread == 0) p.largest[r] = largest, p.sums[r] = sum, p.label_logits[r] = label_logit;
    return;
  }
  if (weight == 0.0f) {   // whatever the logits are; not asked before, for the first loads should not wait for the weight
    Lanes zeros;
#pragma unroll
    for (int lane = 0; lane < Lanes::kLanes; ++lane) zeros.lane[lane] = rounded<T>(0.0f);
    for (int i = thread; i < vectors; i += threads) row_vectors[i] = zeros;
    for (int i = rest + thread; i < columns; i += threads) row[i] = rounded<T>(0.0f);
    if (kPass == Pass::both && thread == 0) p.losses[r] = 0.0f;
    return;
  }
  const float scale = weight / sum;
  for (int first = thread; first < vectors; first += kAhead * threads) {
    Lanes x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * threads;
      if (i < vectors) x[j] = i < kept ? keep[i] : row_vectors[i];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * threads;
      if (i >= vectors) break;
#pragma unroll
      for (int lane = 0; lane < Lanes::kLanes; ++lane) {
        x[j].lane[lane] = rounded<T>(exponential(as_float(x[j].lane[lane]) - largest, T()) * scale);
      }
      __stcs(reinterpret_cast<uint4*>(row_vectors + i), *reinterpret_cast<const uint4*>(&x[j]));   // the next reader is a GEMM, long after
    }
  }
  for (int i = rest + thread; i < columns; i += threads) row[i] = rounded<T>(exponential(as_float(row[i]) - largest, T()) * scale);
  if (here) {   // the thread that wrote the label's number writes it again
    const int owner = label < rest ? (label / Lanes::kLanes) % threads : (label - rest) % threads;
    if (thread == owner) row[label] = rounded<T>(exponential(label_logit - largest, T()) * scale - weight);
  }
  if (kPass == Pass::both && thread == 0) p.losses[r] = weight * (logf(sum) + largest - label_logit);
}

template <typename T, Pass kPass>
void launch(const CrossEntropy& p, CUstream_st* stream) {
  if (p.rows == 0) return;
  if (p.columns < 1 || p.columns > INT_MAX - 8 * 1024 * kAhead || p.rows > INT_MAX) throw std::runtime_error("cross entropy: too many rows or columns");
  constexpr int kLanes = Vector<T>::kLanes;
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.stride % kLanes == 0;
  const int vectors = aligned ? static_cast<int>(p.columns / kLanes) : 0;
  const int threads = p.columns * static_cast<int64_t>(sizeof(T)) >= (64 << 10) ? 1024 : 256;
  int kept = 0;
  if (kPass == Pass::both) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    kept = std::min(vectors, (most - kStaticShared) / 16);
    if (kept * 16 > (48 << 10)) cudaFuncSetAttribute(row_kernel<T, kPass>, cudaFuncAttributeMaxDynamicSharedMemorySize, kept * 16);
  }
  row_kernel<T, kPass><<<static_cast<unsigned>(p.rows), threads, kept * 16, stream>>>(p, vectors, kept);
  check_launch("cross entropy");
}

template <Pass kPass>
void launch(const CrossEntropy& p, CUstream_st* stream) {
  p.bf16 ? launch<__nv_bfloat16, kPass>(p, stream) : launch<float, kPass>(p, stream);
}

}  // namespace

void softmax_sums(const CrossEntropy& p, CUstream_st* stream) { launch<Pass::sums>(p, stream); }
void cross_entropy_gradient(const CrossEntropy& p, CUstream_st* stream) { launch<Pass::gradient>(p, stream); }
void cross_entropy(const CrossEntropy& p, CUstream_st* stream) { launch<Pass::both>(p, stream); }

}  // namespace upcycle::cuda
