#include "ops/cuda/column_sums.hpp"

#include <algorithm>

#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {
namespace {

// A block has 32 columns. Its warp w sums rows w, w + 32, ..., each lane a column; then the tile is turned, and warp w sums what the
// 32 warps have of column w.
__global__ void __launch_bounds__(1024) column_sums(const ColumnSums a, const ColumnSums b) {
  __shared__ float tile[32][33];
  const ColumnSums job = blockIdx.y == 0 ? a : b;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = static_cast<int>(blockIdx.x) * 32;
  if (first >= job.width) return;
  float sum = 0;
  if (first + lane < job.width) {
    const float* column = job.partial + first + lane;
#pragma unroll 8
    for (int64_t row = warp; row < job.rows; row += 32) sum += column[row * job.width];
  }
  tile[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(tile[lane][warp]);
  if (lane == 0 && first + warp < job.width) job.sum[first + warp] += sum;
}

}  // namespace

void add_column_sums(const ColumnSums& a, const ColumnSums& b, CUstream_st* stream) {
  const int widest = std::max(a.width, b.width);
  if (widest == 0) return;
  column_sums<<<dim3((widest + 31) / 32, b.width > 0 ? 2 : 1), 1024, 0, stream>>>(a, b);
  check_launch("column_sums");
}

}  // namespace upcycle::cuda
