#include "ops/cuda/qk_norm_rope.hpp"

#include "ops/cuda/column_sums.hpp"
#include "ops/cuda/packed.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kWarps = kTokensOfBlock, kThreads = 32 * kWarps;
constexpr int kAtOnce = 2;   // heads of a lane that are on their way from memory together

// A warp has a token, and 32 / lanes of its heads at a time: `lanes` neighbours (a power of two) share a head. Each has one vector of the
// head's first half and its partner of the second, so that rotating needs no exchange, and angles and weights stay in registers.
struct Seat {
  __device__ __forceinline__ Seat(int lanes, int head_dim, int numbers)
      : at(static_cast<int>(threadIdx.x) % lanes * numbers), slot(static_cast<int>(threadIdx.x) % 32 / lanes), slots(32 / lanes),
        half(head_dim / 2), taken(at < half) {}
  int at;            // first column of this lane's vector in a half
  int slot, slots;   // heads slot, slot + slots, ... are this lane's
  int half;
  bool taken;        // halves need not be a power of two of vectors: some lanes have nothing
};

template <typename T>
struct Halves {
  Packed<T> first = {}, second = {};
};

template <typename T>
__device__ __forceinline__ Halves<T> read(const void* numbers, int64_t begin, const Seat& seat) {
  const T* const head = static_cast<const T*>(numbers) + begin + seat.at;
  return {Packed<T>::read(head), Packed<T>::read(head + seat.half)};
}

template <typename T>
__device__ __forceinline__ void write(void* numbers, int64_t begin, const Seat& seat, const Halves<T>& x) {
  T* const head = static_cast<T*>(numbers) + begin + seat.at;
  x.first.write(head);
  x.second.write(head + seat.half);
}

// Cosines and sines of one position. Both halves of the table hold the same.
template <int kNumbers>
struct Angles {
  __device__ __forceinline__ Angles(const float* cos_table, const float* sin_table, int64_t position, const Seat& seat) {
    const int64_t begin = position * 2 * seat.half + seat.at;
#pragma unroll
    for (int i = 0; i < kNumbers; i += 4) {
      const float4 c = seat.taken ? *reinterpret_cast<const float4*>(cos_table + begin + i) : float4{};
      const float4 s = seat.taken ? *reinterpret_cast<const float4*>(sin_table + begin + i) : float4{};
      cos[i] = c.x, cos[i + 1] = c.y, cos[i + 2] = c.z, cos[i + 3] = c.w;
      sin[i] = s.x, sin[i + 1] = s.y, sin[i + 2] = s.z, sin[i + 3] = s.w;
    }
  }
  float cos[kNumbers], sin[kNumbers];
};

// The sum over a head's lanes, to all of them.
__device__ __forceinline__ float head_sum(float x, int lanes) {
  for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) norm_rope(const QkNormRope a, const int lanes) {
  using V = Packed<T>;
  const Seat seat(lanes, a.head_dim, V::kLanes);
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (token >= a.tokens) return;   // the whole warp
  const Angles<V::kLanes> angle(a.cos, a.sin, token % a.positions, seat);
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const NormedHeads& part = a.part[p];
    if (part.heads == 0) continue;
    const Halves<T> weight = seat.taken ? read<T>(part.weight, 0, seat) : Halves<T>{};
    const auto mine = [&](int head) { return seat.taken && head < part.heads; };
    for (int begin = 0; begin < part.heads; begin += kAtOnce * seat.slots) {
      Halves<T> x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int head = begin + i * seat.slots + seat.slot;
        if (mine(head)) x[i] = read<T>(a.qkv, token * a.row + (part.first + head) * a.head_dim, seat);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i * seat.slots >= part.heads) break;   // the whole warp
        const int head = begin + i * seat.slots + seat.slot;
        float squares = 0;
#pragma unroll
        for (int j = 0; j < V::kLanes; ++j) {
          squares = __fmaf_rn(x[i].first[j], x[i].first[j], squares);
          squares = __fmaf_rn(x[i].second[j], x[i].second[j], squares);
        }
        const float scale = rsqrtf(head_sum(squares, lanes) / static_cast<float>(a.head_dim) + a.eps);
        // Rounded where the plain form rounds: the unit vector, its product with the weight, the rotated head; nowhere is a product
        // added before it is rounded to fp32.
        float first[V::kLanes], second[V::kLanes];
#pragma unroll
        for (int j = 0; j < V::kLanes; ++j) first[j] = x[i].first[j] * scale, second[j] = x[i].second[j] * scale;
        V u = V::of(first), v = V::of(second);
#pragma unroll
        for (int j = 0; j < V::kLanes; ++j) first[j] = u[j] * weight.first[j], second[j] = v[j] * weight.second[j];
        u = V::of(first), v = V::of(second);
#pragma unroll
        for (int j = 0; j < V::kLanes; ++j) {
          first[j] = __fsub_rn(__fmul_rn(u[j], angle.cos[j]), __fmul_rn(v[j], angle.sin[j]));
          second[j] = __fadd_rn(__fmul_rn(v[j], angle.cos[j]), __fmul_rn(u[j], angle.sin[j]));
        }
        if (mine(head)) write<T>(part.y, (token * part.heads + head) * a.head_dim, seat, {V::of(first), V::of(second)});
      }
    }
  }
}

// Blocks 0 .. q.blocks have q's heads of all tokens in turn, those behind them k's and v's: a thread adds to one weight's gradient only.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) norm_rope_backward(const QkNormRopeBackward a, const int lanes) {
  using V = Packed<T>;
  extern __shared__ float of_warps[];   // [kWarps, head_dim]
  const Seat seat(lanes, a.head_dim, V::kLanes);
  const bool of_q = static_cast<int>(blockIdx.x) < a.q.blocks;
  const NormedHeadsBackward part = of_q ? a.q : a.k;
  const int block = of_q ? blockIdx.x : blockIdx.x - a.q.blocks, warp = threadIdx.x / 32;
  const Halves<T> weight = seat.taken ? read<T>(part.weight, 0, seat) : Halves<T>{};
  float first_sum[V::kLanes] = {}, second_sum[V::kLanes] = {};
  for (int64_t token = int64_t{block} * kWarps + warp; token < a.tokens; token += int64_t{part.blocks} * kWarps) {
    const int64_t sequence = token / a.positions, position = token - sequence * a.positions;
    const auto gradient = [&](const HeadGradient& of, int head) {
      if (of.dy == nullptr) return Halves<T>{};
      return read<T>(of.dy, sequence * of.of_sequence + position * of.of_position + head * of.of_head, seat);
    };
    const auto begin_of = [&](const HeadGradient& of, int head) { return token * a.row + (of.first + head) * a.head_dim; };
    const Angles<V::kLanes> angle(a.cos, a.sin, position, seat);
    if (!of_q && seat.taken) {
      for (int head = seat.slot; head < a.v.heads; head += seat.slots) write<T>(a.d_qkv, begin_of(a.v, head), seat, gradient(a.v, head));
    }
    const int heads = part.heads.heads;
    for (int begin = 0; begin < heads; begin += kAtOnce * seat.slots) {
      Halves<T> x[kAtOnce], dy[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int head = begin + i * seat.slots + seat.slot;
        if (!seat.taken || head >= heads) continue;
        x[i] = read<T>(a.qkv, begin_of(part.heads, head), seat);
        dy[i] = gradient(part.heads, head);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i * seat.slots >= heads) break;   // the whole warp
        // The gradient turned back, and two sums over the head at once: of x^2, and of the gradient of the unit vector along x.
        float first[V::kLanes], second[V::kLanes], squares = 0, along = 0;
#pragma unroll
        for (int j = 0; j < V::kLanes; ++j) {
          const float x1 = x[i].first[j], x2 = x[i].second[j];
          first[j] = dy[i].first[j] * angle.cos[j] + dy[i].second[j] * angle.sin[j];
          second[j] = dy[i].second[j] * angle.cos[j] - dy[i].first[j] * angle.sin[j];
          squares = __fmaf_rn(x1, x1, squares);
          squares = __fmaf_rn(x2, x2, squares);
          along += first[j] * weight.first[j] * x1 + second[j] * weight.second[j] * x2;
        }
        const float scale = rsqrtf(head_sum(squares, lanes) / static_cast<float>(a.head_dim) + a.eps);
        along = head_sum(along, lanes) * scale / static_cast<float>(a.head_dim);
#pragma unroll
        for (int j = 0; j < V::kLanes; ++j) {
          const float u1 = x[i].first[j] * scale, u2 = x[i].second[j] * scale;
          first_sum[j] += first[j] * u1, second_sum[j] += second[j] * u2;
          first[j] = (first[j] * weight.first[j] - u1 * along) * scale;
          second[j] = (second[j] * weight.second[j] - u2 * along) * scale;
        }
        const int head = begin + i * seat.slots + seat.slot;
        if (seat.taken && head < heads) write<T>(a.d_qkv, begin_of(part.heads, head), seat, {V::of(first), V::of(second)});
      }
    }
  }
#pragma unroll
  for (int j = 0; j < V::kLanes; ++j) {
    for (int other = lanes; other < 32; other *= 2) {
      first_sum[j] += __shfl_xor_sync(0xffffffffu, first_sum[j], other);
      second_sum[j] += __shfl_xor_sync(0xffffffffu, second_sum[j], other);
    }
    if (seat.slot != 0 || !seat.taken) continue;
    of_warps[warp * a.head_dim + seat.at + j] = first_sum[j];
    of_warps[warp * a.head_dim + seat.half + seat.at + j] = second_sum[j];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < a.head_dim; d += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w * a.head_dim + d];
    part.partial[int64_t{block} * a.head_dim + d] = sum;
  }
}

int lanes_of_head(int head_dim, bool bf16) {
  int lanes = 1;
  while (lanes * 2 * (bf16 ? 8 : 4) < head_dim) lanes *= 2;
  return lanes;
}

}  // namespace

void qk_norm_rope(const QkNormRope& a, CUstream_st* stream) {
  if (a.tokens == 0) return;
  const auto kernel = a.bf16 ? norm_rope<__nv_bfloat16> : norm_rope<float>;
  kernel<<<blocks_of(a.tokens, kWarps), kThreads, 0, stream>>>(a, lanes_of_head(a.head_dim, a.bf16));
  check_launch("qk_norm_rope");
}

void qk_norm_rope_backward(const QkNormRopeBackward& a, CUstream_st* stream) {
  if (a.tokens == 0) return;
  const auto kernel = a.bf16 ? norm_rope_backward<__nv_bfloat16> : norm_rope_backward<float>;
  const size_t room = sizeof(float) * kWarps * a.head_dim;
  kernel<<<a.q.blocks + a.k.blocks, kThreads, room, stream>>>(a, lanes_of_head(a.head_dim, a.bf16));
  check_launch("qk_norm_rope_backward");
  add_column_sums({a.q.partial, a.q.blocks, a.head_dim, a.q.weight_sum}, {a.k.partial, a.k.blocks, a.head_dim, a.k.weight_sum}, stream);
}

}  // namespace upcycle::cuda
