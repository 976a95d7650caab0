#include <algorithm>
#include <climits>

#include "ops/cuda/embedding.hpp"
#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kWarps = 8;    // share the rows of one id: frequent tokens, and ids of other ranks, which all stand for one row
constexpr int kAhead = 4;    // rows of a warp on their way at once

// One block for each sorted id and tile of columns; the first block of equal ids works for all of them, the others have nothing to do.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) embedding_kernel(EmbeddingGradient p) {
  constexpr int kLanes = Vector<T>::kLanes, kColumns = 32 * kLanes;
  __shared__ float shared[kWarps][kColumns];
  const int64_t begin = blockIdx.x, id = p.sorted[begin];
  if (begin > 0 && p.sorted[begin - 1] == id) return;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* const dy = static_cast<const T*>(p.dy);
  // The lane's numbers of a row: side by side where vectors fit, else every 32nd.
  const auto column = [&](int k) { return tile + (kAligned ? lane * kLanes + k : k * 32 + lane); };

  float sum[kLanes] = {};
  for (int64_t first = begin + warp; first < p.rows && p.sorted[first] == id; first += kWarps * kAhead) {
    Vector<T> x[kAhead];
    bool there[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t n = first + j * kWarps;
      there[j] = n < p.rows && p.sorted[n] == id;
      if (!there[j]) continue;
      const T* const row = dy + p.order[n] * p.width;
      if constexpr (kAligned) {
        if (column(0) < p.width) x[j] = *reinterpret_cast<const Vector<T>*>(row + column(0));
      } else {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          if (column(k) < p.width) x[j].lane[k] = row[column(k)];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (!there[j]) break;
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        if (column(k) < p.width) sum[k] += as_float(x[j].lane[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) shared[warp][column(k) - tile] = sum[k];
  __syncthreads();
  for (int c = threadIdx.x; c < kColumns && tile + c < p.width; c += 32 * kWarps) {
    float total = shared[0][c];
    for (int w = 1; w < kWarps; ++w) total += shared[w][c];
    p.gradients[id * p.width + tile + c] += total;
  }
}

template <typename T>
void launch(const EmbeddingGradient& p, CUstream_st* stream) {
  constexpr int kLanes = Vector<T>::kLanes, kColumns = 32 * kLanes;
  const bool aligned = p.width % kLanes == 0 && reinterpret_cast<uintptr_t>(p.dy) % 16 == 0;
  const dim3 blocks(static_cast<unsigned>(p.rows), static_cast<unsigned>((p.width + kColumns - 1) / kColumns));
  aligned ? embedding_kernel<T, true><<<blocks, 32 * kWarps, 0, stream>>>(p) : embedding_kernel<T, false><<<blocks, 32 * kWarps, 0, stream>>>(p);
  check_launch("embedding's gradient");
}

}  // namespace

void add_embedding_gradient(const EmbeddingGradient& p, CUstream_st* stream) {
  if (p.rows == 0 || p.width == 0) return;
  if (p.rows > INT_MAX) throw std::runtime_error("embedding's gradient: too many tokens");
  p.bf16 ? launch<__nv_bfloat16>(p, stream) : launch<float>(p, stream);
}

}  // namespace upcycle::cuda
