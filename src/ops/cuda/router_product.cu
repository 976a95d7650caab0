// Both products are out[m, n] = sum_k A[m, k] B[k, n], A of bf16, B in three terms:
//   logits    m: rows of x,    k: width,      n: outputs;   A and B lie with k side by side
//   gradient  m: width,        k: rows of x,  n: outputs;   A and B lie with k one below the other
// A block makes 128 x 8 NT of it in steps of 64 k; of its eight warps four share m, and two share k.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/router_product.hpp"

#include <algorithm>

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 256, kStages = 3, kTileM = 128, kTileK = 64;
constexpr int kBytesOfA = kTileM * kTileK * 2;
template <int NT>
constexpr int kBytesOfTerm = kTileK * 8 * NT * 2;
template <int NT>
constexpr int kBytesOfStage = kBytesOfA + 3 * kBytesOfTerm<NT>;

/// 16 bytes, zeros where there is nothing.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

/// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t from) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
  }
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Where 16 bytes lie in a row of so many times 16: eight rows that are read at once meet in no bank.
template <int kChunks>
__device__ __forceinline__ uint32_t place(int row, int chunk) {
  constexpr int kMask = (kChunks < 8 ? kChunks : 8) - 1, kShift = kChunks >= 8 ? 0 : kChunks == 4 ? 1 : kChunks == 2 ? 2 : 3;
  return static_cast<uint32_t>(row * kChunks + (chunk ^ (row >> kShift & kMask))) * 16;
}

template <int NT, bool kGradient>
__global__ void __launch_bounds__(kThreads) multiply(RouterProduct p, int64_t tiles_n, int64_t tiles_m, int64_t rows_of_split) {
  extern __shared__ __align__(128) char shared[];
  const auto* const x = static_cast<const __nv_bfloat16*>(p.x_TD);
  const auto* const terms = static_cast<const __nv_bfloat16*>(p.terms);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 32 % 4, warp_k = thread / 128;
  const int64_t tile = blockIdx.x, n0 = tile % tiles_n * (8 * NT), m0 = tile / tiles_n % tiles_m * kTileM, split = tile / tiles_n / tiles_m;
  const int64_t begin = kGradient ? split * rows_of_split : 0;
  const int64_t end = !kGradient ? p.width : begin + rows_of_split < p.rows ? begin + rows_of_split : p.rows;
  const int64_t steps = end > begin ? (end - begin + kTileK - 1) / kTileK : 0;
  // Rows of 16-byte chunks in shared memory: k or m (n) side by side.
  constexpr int kChunksOfA = kGradient ? kTileM / 8 : kTileK / 8, kChunksOfB = kGradient ? NT : kTileK / 8;

  const auto load = [&](int64_t step) {
    const int64_t k0 = begin + step * kTileK;
    const uint32_t stage = base + static_cast<uint32_t>(step % kStages) * kBytesOfStage<NT>;
#pragma unroll
    for (int i = 0; i < kTileM * kTileK / 8 / kThreads; ++i) {
      const int number = i * kThreads + thread, row = number / kChunksOfA, chunk = number % kChunksOfA;
      const int64_t t = (kGradient ? k0 : m0) + row, d = (kGradient ? m0 : k0) + chunk * 8;
      const bool there = t < (kGradient ? end : p.rows) && d < p.width;
      copy_async(stage + place<kChunksOfA>(row, chunk), there ? x + t * p.width + d : x, there);
    }
    for (int number = thread; number < 3 * kTileK * NT; number += kThreads) {
      const int term = number / (kTileK * NT), in_term = number % (kTileK * NT), row = in_term / kChunksOfB, chunk = in_term % kChunksOfB;
      const int64_t r = (kGradient ? k0 : n0) + row, c = (kGradient ? n0 : k0) + chunk * 8;
      const bool there = kGradient ? r < end : c < p.width;
      copy_async(stage + kBytesOfA + term * kBytesOfTerm<NT> + place<kChunksOfB>(row, chunk),
                 there ? terms + term * p.slot_stride + r * p.row_stride + c : terms, there);
    }
  };

  float sum[2][NT][4] = {};
  const int matrix = lane / 8, row_of_matrix = lane % 8;
  const auto compute = [&](int64_t step) {
    const uint32_t stage = base + static_cast<uint32_t>(step % kStages) * kBytesOfStage<NT>;
    uint32_t a[2][2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        // The four matrices: both halves of 16 m, for the first half of 16 k, then for the second.
        const int of_m = warp_m * 32 + m * 16 + matrix % 2 * 8, of_k = warp_k * 32 + k * 16 + matrix / 2 * 8;
        load_matrices<kGradient>(a[m][k], stage + (kGradient ? place<kChunksOfA>(of_k + row_of_matrix, of_m / 8)
                                                             : place<kChunksOfA>(of_m + row_of_matrix, of_k / 8)));
      }
    }
    constexpr int kAtOnce = NT < 2 ? NT : 2;
#pragma unroll
    for (int first = 0; first < NT; first += kAtOnce) {
      uint32_t b[kAtOnce][3][4];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
        for (int term = 0; term < 3; ++term) {
          const int of_k = warp_k * 32 + matrix * 8;                          // all 32 k of the warp
          load_matrices<kGradient>(b[n][term], stage + kBytesOfA + term * kBytesOfTerm<NT> +
                                                   (kGradient ? place<kChunksOfB>(of_k + row_of_matrix, first + n)
                                                              : place<kChunksOfB>((first + n) * 8 + row_of_matrix, of_k / 8)));
        }
      }
      // The small terms first: what is cut off of them is nothing. Then 2 x 16 products of the large one.
      float part[2][kAtOnce][4] = {};
#pragma unroll
      for (int term = 2; term >= 0; --term) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_add(part[m][n], a[m][k], b[n][term][2 * k], b[n][term][2 * k + 1]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][first + n][i] += part[m][n][i];
        }
      }
    }
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();                                                          // and the stage that is filled next has been read
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    commit();
    compute(step);
  }
  wait_for_copies<0>();
  __syncthreads();

  // The second half of k hands its sums to the first.
  float* const others = reinterpret_cast<float*>(shared) + warp_m * (8 * NT * 32) + lane;
#pragma unroll
  for (int i = 0; i < 8 * NT; ++i) {
    if (warp_k == 1) others[i * 32] = sum[i / 4 / NT][i / 4 % NT][i % 4];
  }
  __syncthreads();
  if (warp_k == 1) return;
#pragma unroll
  for (int i = 0; i < 8 * NT; ++i) {
    const int m_tile = i / 4 / NT, n_tile = i / 4 % NT, in_tile = i % 4;
    const int64_t m = m0 + warp_m * 32 + m_tile * 16 + in_tile / 2 * 8 + lane / 4, n = n0 + n_tile * 8 + lane % 4 * 2 + in_tile % 2;
    const float value = sum[m_tile][n_tile][in_tile] + others[i * 32];
    if (n >= p.outputs || m >= (kGradient ? p.width : p.rows)) continue;
    p.out[kGradient ? (split * p.outputs + n) * p.width + m : m * p.outputs + n] = value;
  }
}

template <int NT, bool kGradient>
void launch(const RouterProduct& p, CUstream_st* stream) {
  constexpr int kShared = kStages * kBytesOfStage<NT>;
  static_assert(4 * 8 * NT * 32 * sizeof(float) <= kShared);
  const int64_t tiles_n = padded_outputs(p.outputs) / (8 * NT), tiles_m = ((kGradient ? p.width : p.rows) + kTileM - 1) / kTileM;
  const int64_t splits = kGradient ? p.splits : 1, rows_of_split = ((p.rows + splits - 1) / splits + kTileK - 1) / kTileK * kTileK;
  cudaFuncSetAttribute(multiply<NT, kGradient>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  multiply<NT, kGradient><<<static_cast<unsigned>(tiles_n * tiles_m * splits), kThreads, kShared, stream>>>(p, tiles_n, tiles_m,
                                                                                                             rows_of_split);
  check_launch(kGradient ? "router_weight_gradient" : "router_product");
}

template <bool kGradient>
void launch(const RouterProduct& p, CUstream_st* stream) {
  const int64_t padded = padded_outputs(p.outputs);
  if (padded == 8) return launch<1, kGradient>(p, stream);
  if (padded == 16) return launch<2, kGradient>(p, stream);
  int device = 0, room = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (padded == 32 || room < kStages * kBytesOfStage<8>) return launch<4, kGradient>(p, stream);
  launch<8, kGradient>(p, stream);
}

__global__ void __launch_bounds__(kThreads) split(Terms a) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, vectors = a.padded_columns / 8;
  if (number >= a.padded_rows * vectors) return;
  const int64_t row = number / vectors, column = number % vectors * 8;
  Vector<__nv_bfloat16> terms[3];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float left = row < a.rows && column + i < a.columns ? a.x_RC[row * a.columns + column + i] : 0.0f;
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      terms[term].lane[i] = rounded<__nv_bfloat16>(left);
      left -= as_float(terms[term].lane[i]);                                  // exact: the difference has fewer bits
    }
  }
  auto* const out = static_cast<__nv_bfloat16*>(a.out) + row * a.row_stride + column;
#pragma unroll
  for (int slot = 0; slot < 6; ++slot) {
    if (slot >= a.slots) break;
    const int term = a.term[slot];
    *reinterpret_cast<Vector<__nv_bfloat16>*>(out + slot * a.slot_stride) = term == 0 ? terms[0] : term == 1 ? terms[1] : terms[2];
  }
}

__global__ void __launch_bounds__(kThreads) add_partial(float* sum, const float* partial, int64_t size, int64_t splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float total = 0.0f;
#pragma unroll 8
  for (int64_t s = 0; s < splits; ++s) total += partial[s * size + i];
  sum[i] += total;
}

}  // namespace

void split_into_terms(const Terms& a, CUstream_st* stream) {
  const int64_t vectors = a.padded_rows * (a.padded_columns / 8);
  if (vectors == 0) return;
  split<<<blocks_of(vectors, kThreads), kThreads, 0, stream>>>(a);
  check_launch("split_into_terms");
}

int64_t padded_outputs(int64_t outputs) { return outputs <= 8 ? 8 : outputs <= 16 ? 16 : outputs <= 32 ? 32 : (outputs + 63) / 64 * 64; }

void router_product(const RouterProduct& p, CUstream_st* stream) {
  if (p.rows > 0) launch<false>(p, stream);
}

void router_weight_gradient(const RouterProduct& p, CUstream_st* stream) { launch<true>(p, stream); }

int64_t row_splits(int64_t rows, int64_t width, int64_t outputs) {
  const int64_t padded = padded_outputs(outputs), tiles = (width + kTileM - 1) / kTileM * ((padded + 63) / 64);
  const int64_t wanted = (padded <= 16 ? 256 : 128) / tiles;                   // of narrow tiles two fit on a multiprocessor
  return std::max<int64_t>(1, std::min(wanted, rows / (4 * kTileK)));
}

void add_partial_sums(float* sum, const float* partial, int64_t size, int64_t splits, CUstream_st* stream) {
  if (size == 0) return;
  add_partial<<<blocks_of(size, kThreads), kThreads, 0, stream>>>(sum, partial, size, splits);
  check_launch("add_partial_sums");
}

}  // namespace upcycle::cuda
