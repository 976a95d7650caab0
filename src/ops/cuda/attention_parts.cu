// One pass each, a thread for 16 bytes of a row. Bytes moved for N numbers: a merge 6 N, a sum of n parts 2 (n + 1) N.
#include "ops/cuda/attention_parts.hpp"
#include "ops/cuda/packed.cuh"

namespace upcycle::cuda {
namespace {

using Numbers = Packed<__nv_bfloat16>;
constexpr int kThreads = 256;

/// The 16 bytes that are this thread's: neighbours take the same position's heads, as [B, S, H, D] lies.
struct Here {
  int sequence, head, position, lane;
  __device__ explicit Here(const Shape& shape) : sequence(blockIdx.y) {
    const int vectors = shape.width / Numbers::kLanes, i = blockIdx.x * kThreads + threadIdx.x, row = i / vectors;
    lane = (i % vectors) * Numbers::kLanes;
    head = row % shape.heads;
    position = row / shape.heads;
  }
  __device__ int64_t in(const Strides& strides) const {
    return sequence * strides.sequence + head * strides.head + position * strides.position;
  }
  __device__ void* in(const Heads& x) const { return static_cast<__nv_bfloat16*>(x.numbers) + in(x.strides) + lane; }
};

__global__ void __launch_bounds__(kThreads) merge_kernel(PartsMerge m) {
  const Here here(m.shape);
  if (here.position >= m.shape.positions) return;
  const float of_a = m.lse_a.numbers[here.in(m.lse_a.strides)], of_b = m.lse_b.numbers[here.in(m.lse_b.strides)];
  const float larger = fmaxf(of_a, of_b), both = larger + log1pf(expf(fminf(of_a, of_b) - larger));
  const float share_a = expf(of_a - both), share_b = expf(of_b - both);
  const Numbers a = Numbers::read(here.in(m.a)), b = Numbers::read(here.in(m.b));
  float out[Numbers::kLanes];
#pragma unroll
  for (int i = 0; i < Numbers::kLanes; ++i) out[i] = a[i] * share_a + b[i] * share_b;
  Numbers::of(out).write(here.in(m.out));
  if (here.lane == 0) m.lse.numbers[here.in(m.lse.strides)] = both;
}

template <int kCount>
__global__ void __launch_bounds__(kThreads) sum_kernel(PartsSum s) {
  const Here here(s.shape);
  if (here.position >= s.shape.positions) return;
  float sum[Numbers::kLanes] = {};
#pragma unroll
  for (int part = 0; part < kCount; ++part) {
    const Numbers x = Numbers::read(here.in(s.parts[part]));
#pragma unroll
    for (int i = 0; i < Numbers::kLanes; ++i) sum[i] += x[i];
  }
  Numbers::of(sum).write(here.in(s.to));
}

dim3 grid_of(const Shape& shape) {
  const int64_t vectors = int64_t{shape.positions} * shape.heads * (shape.width / Numbers::kLanes);
  return dim3(static_cast<unsigned>(blocks_of(vectors, kThreads)), static_cast<unsigned>(shape.sequences));
}

}  // namespace

void merge_parts(const PartsMerge& m, CUstream_st* stream) {
  merge_kernel<<<grid_of(m.shape), kThreads, 0, stream>>>(m);
  check_launch("merge_parts");
}

void sum_parts(const PartsSum& s, CUstream_st* stream) {
  constexpr void (*kernels[PartsSum::kMost])(PartsSum) = {sum_kernel<1>, sum_kernel<2>, sum_kernel<3>, sum_kernel<4>};
  kernels[s.count - 1]<<<grid_of(s.shape), kThreads, 0, stream>>>(s);
  check_launch("sum_parts");
}

}  // namespace upcycle::cuda
