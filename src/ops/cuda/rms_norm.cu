#include "ops/cuda/rms_norm.hpp"

#include "ops/cuda/column_sums.hpp"
#include "ops/cuda/packed.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 256;         // of a block of forward that has several rows
constexpr int kMostVectors = 8;       // of a row in one thread of forward
constexpr int kMostThreads = 512;     // of a block of backward

// A row of forward belongs to `lanes` threads: some of a warp (a power of two), with several rows in a block, or (kWide) a whole block.
// It stays in registers between the sum of squares and the product: memory is read once. The sum is the same with and without a branch,
// bit for bit: what is computed again for backward relies on it.
template <typename T, int kVectors, bool kAdds, bool kWide>
__global__ void __launch_bounds__(kThreads, kVectors < kMostVectors ? 4 : kAdds ? 2 : 3) norm_rows(const RmsNorm a, const int lanes) {
  using V = Packed<T>;
  __shared__ float shared[32];
  const int lane = kWide ? threadIdx.x : threadIdx.x % lanes;
  const int64_t row = kWide ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t begin = row * (a.width / V::kLanes);
  const int vectors = row < a.rows ? a.width / V::kLanes : 0;   // threads without a row only take part in the sums
  V x[kVectors], branch[kAdds ? kVectors : 1];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = lane + i * lanes;
    if (at >= vectors) continue;
    x[i] = V::read(a.x, begin + at);
    if constexpr (kAdds) branch[i] = V::read(a.branch, begin + at);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = lane + i * lanes;
    if (at >= vectors) continue;
    if constexpr (kAdds) {
      float sum[V::kLanes];
#pragma unroll
      for (int j = 0; j < V::kLanes; ++j) sum[j] = x[i][j] + branch[i][j];
      x[i] = V::of(sum);
      x[i].write(a.sum, begin + at);
    }
#pragma unroll
    for (int j = 0; j < V::kLanes; ++j) squares = __fmaf_rn(x[i][j], x[i][j], squares);
  }
  if constexpr (kWide) {
    squares = block_sum(squares, shared);
  } else {
    for (int other = lanes / 2; other > 0; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
  }
  const float scale = rsqrtf(squares / static_cast<float>(a.width) + a.eps);
  if (lane == 0 && vectors > 0) a.scale[row] = scale;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = lane + i * lanes;
    if (at >= vectors) continue;
    const V weight = V::read(a.weight, at);
    float unit[V::kLanes], y[V::kLanes];
#pragma unroll
    for (int j = 0; j < V::kLanes; ++j) unit[j] = x[i][j] * scale;
    const V rounded_unit = V::of(unit);
#pragma unroll
    for (int j = 0; j < V::kLanes; ++j) y[j] = rounded_unit[j] * weight[j];
    V::of(y).write(a.y, begin + at);
  }
}

// One thread's part of a row of backward.
template <typename T, int kVectors, bool kStreams>
struct Row {
  Packed<T> x[kVectors], dy[kVectors], stream[kStreams ? kVectors : 1];
  float scale;
};

template <typename T, int kVectors, bool kStreams>
__device__ __forceinline__ Row<T, kVectors, kStreams> read_row(const RmsNormBackward& a, int64_t row) {
  using V = Packed<T>;
  Row<T, kVectors, kStreams> r = {};
  const int vectors = a.width / V::kLanes;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    r.x[i] = V::read(a.x, row * vectors + at);
    r.dy[i] = V::read(a.dy, row * vectors + at);
    if constexpr (kStreams) r.stream[i] = V::read(a.stream, row * vectors + at);
  }
  r.scale = a.scale[row];
  return r;
}

// A block takes rows b, b + blocks, ... A thread keeps its columns' part of the weight gradient in registers over all of them, and reads
// the next row while the block sums this one: the sum over a row is all it waits for.
template <typename T, int kVectors, bool kStreams>
__global__ void __launch_bounds__(kMostThreads, kVectors == 1 ? 2 : 1) norm_rows_backward(const RmsNormBackward a) {
  using V = Packed<T>;
  constexpr bool kAhead = kVectors < 4;   // four do not fit into the registers twice
  __shared__ float shared[2][kMostThreads / 32];
  const int vectors = a.width / V::kLanes, warps = blockDim.x / 32;
  V weight[kVectors] = {};
  float weight_sum[kVectors][V::kLanes] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < vectors) weight[i] = V::read(a.weight, at);
  }
  Row<T, kVectors, kStreams> next;
  if constexpr (kAhead) next = read_row<T, kVectors, kStreams>(a, blockIdx.x);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    Row<T, kVectors, kStreams> r;
    if constexpr (kAhead) {
      r = next;
      if (row + gridDim.x < a.rows) next = read_row<T, kVectors, kStreams>(a, row + gridDim.x);
    } else {
      r = read_row<T, kVectors, kStreams>(a, row);
    }
    float along = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < V::kLanes; ++j) {
        const float part = r.dy[i][j] * (r.x[i][j] * r.scale);
        weight_sum[i][j] += part;
        along += part * weight[i][j];
      }
    }
    // Two rows in turn have two places for their sums, so one barrier a row is enough: who is at the next but one has passed the next.
    along = warp_sum(along);
    if (threadIdx.x % 32 == 0) shared[turn][threadIdx.x / 32] = along;
    __syncthreads();
    along = 0;
    for (int warp = 0; warp < warps; ++warp) along += shared[turn][warp];
    along /= static_cast<float>(a.width);
    // d/dx of x * scale(x): the part of the gradient along x itself is taken out.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= vectors) continue;
      float dx[V::kLanes];
#pragma unroll
      for (int j = 0; j < V::kLanes; ++j) {
        dx[j] = (r.dy[i][j] * weight[i][j] - r.x[i][j] * r.scale * along) * r.scale;
        if constexpr (kStreams) dx[j] += r.stream[i][j];
      }
      V::of(dx).write(a.dx, row * vectors + at);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    float* const out = a.partial + int64_t{blockIdx.x} * a.width + at * V::kLanes;
#pragma unroll
    for (int j = 0; j < V::kLanes; j += 4) {
      *reinterpret_cast<float4*>(out + j) = {weight_sum[i][j], weight_sum[i][j + 1], weight_sum[i][j + 2], weight_sum[i][j + 3]};
    }
  }
}

template <typename T, bool kAdds>
void launch(const RmsNorm& a, cudaStream_t stream) {
  const int vectors = a.width / Packed<T>::kLanes;
  if (vectors > 32 * kMostVectors) {
    const int threads = (vectors + 32 * kMostVectors - 1) / (32 * kMostVectors) * 32;
    norm_rows<T, kMostVectors, kAdds, true><<<static_cast<unsigned>(a.rows), threads, 0, stream>>>(a, threads);
    return;
  }
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  const int each = (vectors + lanes - 1) / lanes, blocks = blocks_of(a.rows, kThreads / lanes);
  const auto kernel = each == 1   ? norm_rows<T, 1, kAdds, false>
                      : each == 2 ? norm_rows<T, 2, kAdds, false>
                      : each <= 4 ? norm_rows<T, 4, kAdds, false>
                                  : norm_rows<T, kMostVectors, kAdds, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(a, lanes);
}

template <typename T, bool kStreams>
void launch(const RmsNormBackward& a, int64_t blocks, cudaStream_t stream) {
  const int each = rms_norm_vectors(a.width, a.bf16);
  const auto kernel = each == 1   ? norm_rows_backward<T, 1, kStreams>
                      : each == 2 ? norm_rows_backward<T, 2, kStreams>
                                  : norm_rows_backward<T, 4, kStreams>;
  kernel<<<static_cast<unsigned>(blocks), rms_norm_threads(a.width, a.bf16), 0, stream>>>(a);
}

}  // namespace

void rms_norm(const RmsNorm& a, CUstream_st* stream) {
  if (a.rows == 0) return;
  if (a.bf16) {
    a.branch != nullptr ? launch<__nv_bfloat16, true>(a, stream) : launch<__nv_bfloat16, false>(a, stream);
  } else {
    a.branch != nullptr ? launch<float, true>(a, stream) : launch<float, false>(a, stream);
  }
  check_launch("rms_norm");
}

void rms_norm_backward(const RmsNormBackward& a, CUstream_st* stream) {
  if (a.rows == 0) return;
  const int64_t blocks = rms_norm_partials(a.rows, a.width, a.bf16);
  if (a.bf16) {
    a.stream != nullptr ? launch<__nv_bfloat16, true>(a, blocks, stream) : launch<__nv_bfloat16, false>(a, blocks, stream);
  } else {
    a.stream != nullptr ? launch<float, true>(a, blocks, stream) : launch<float, false>(a, blocks, stream);
  }
  check_launch("rms_norm_backward");
  add_column_sums({a.partial, blocks, a.width, a.weight_sum}, {}, stream);
}

}  // namespace upcycle::cuda
