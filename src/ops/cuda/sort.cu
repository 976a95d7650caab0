// Count by tile and number, add up over the tiles, place. A tile is one warp's, which goes through it in order, 32 choices a round, and
// finds those of the same number by matching: so the order is that of the choices, and nothing depends on which thread came first.
#include "ops/cuda/sort.hpp"

#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kRounds = static_cast<int>(kSortStretch) / 32;
constexpr unsigned kAll = 0xffffffffu;

/// The choices as the kernels see them. A number is an expert's place in the range, or `experts` for all others.
struct Tiles {
  const int64_t* expert;
  int64_t choices, first, tile;
  int experts, tiles;
  int32_t* count;   ///< [experts + 1, tiles], then what is before each tile
  int32_t* total;   ///< [experts + 1]
};

/// visit(choice, number) for this block's choices in order, by all lanes; number -1: there is none.
template <class Visit>
__device__ __forceinline__ void for_each_round(const Tiles& t, Visit&& visit) {
  const int64_t begin = blockIdx.x * t.tile, end = begin + t.tile < t.choices ? begin + t.tile : t.choices;
  for (int64_t stretch = begin + threadIdx.x; stretch - threadIdx.x < end; stretch += kSortStretch) {
    int number[kRounds];   // all on their way before the first is looked at
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      number[r] = -1;
      if (stretch + r * 32 < end) {
        const int64_t expert = t.expert[stretch + r * 32] - t.first;
        number[r] = expert >= 0 && expert < t.experts ? static_cast<int>(expert) : t.experts;
      }
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) visit(stretch + r * 32, number[r]);
  }
}

/// The lanes before this one that have its number; and whether it is the first, with how many there are.
struct Same {
  int before, all;
  __device__ __forceinline__ explicit Same(int number) {
    const unsigned lanes = __match_any_sync(kAll, number);
    before = __popc(lanes & ((1u << threadIdx.x) - 1));
    all = __popc(lanes);
  }
};

__device__ __forceinline__ int sum_up_to_here(int x) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(kAll, x, lanes);
    if (static_cast<int>(threadIdx.x % 32) >= lanes) x += other;
  }
  return x;
}

__global__ void __launch_bounds__(32) count_kernel(Tiles t) {
  extern __shared__ int count[];
  for (int e = threadIdx.x; e <= t.experts; e += 32) count[e] = 0;
  __syncwarp();
  for_each_round(t, [&](int64_t, int number) {
    const Same same(number);
    if (number >= 0 && same.before == 0) count[number] += same.all;
    __syncwarp();
  });
  for (int e = threadIdx.x; e <= t.experts; e += 32) t.count[static_cast<int64_t>(e) * t.tiles + blockIdx.x] = count[e];
}

/// A warp for each number: its counts by tile become what is before each tile; their sum goes to `total`, and to `count` of an expert.
__global__ void __launch_bounds__(128) scan_kernel(Tiles t, int64_t* count) {
  constexpr int kAtOnce = 8;
  const int number = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (number > t.experts) return;
  int32_t* const of_tile = t.count + static_cast<int64_t>(number) * t.tiles;
  int before = 0;
  for (int first = 0; first < t.tiles; first += 32 * kAtOnce) {
    int n[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) n[i] = first + i * 32 + lane < t.tiles ? of_tile[first + i * 32 + lane] : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int with_own = sum_up_to_here(n[i]);
      if (first + i * 32 + lane < t.tiles) of_tile[first + i * 32 + lane] = before + with_own - n[i];
      before += __shfl_sync(kAll, with_own, 31);
    }
  }
  if (lane != 0) return;
  t.total[number] = before;
  if (count && number < t.experts) count[number] = before;
}

__global__ void __launch_bounds__(32) place_kernel(Tiles t, int64_t* __restrict__ choice, int64_t* __restrict__ row, int32_t* __restrict__ end,
                                                   int64_t rows, int64_t slots) {
  extern __shared__ int next[];   // the place of the next choice of each number: among all, or among the expert's slots
  const int lane = threadIdx.x;
#pragma unroll 8
  for (int e = lane; e <= t.experts; e += 32) next[e] = t.total[e];
  __syncwarp();
  int before = 0;
  for (int first = 0; first <= t.experts; first += 32) {
    const int e = first + lane, n = e <= t.experts ? next[e] : 0, with_own = sum_up_to_here(n);
    if (e <= t.experts) next[e] = slots > 0 ? 0 : before + with_own - n;
    if (e < t.experts && blockIdx.x == 0) end[e] = static_cast<int32_t>(slots > 0 ? (e + 1) * slots : before + with_own);
    before += __shfl_sync(kAll, with_own, 31);
  }
  __syncwarp();
#pragma unroll 8
  for (int e = lane; e <= t.experts; e += 32) next[e] += t.count[static_cast<int64_t>(e) * t.tiles + blockIdx.x];
  __syncwarp();
  for_each_round(t, [&](int64_t i, int number) {
    const Same same(number);
    const int64_t place = number >= 0 ? next[number] + same.before : rows;
    __syncwarp();
    if (number >= 0 && same.before == 0) next[number] += same.all;
    __syncwarp();
    if (number < 0) return;
    const int64_t wanted = slots == 0 ? place : number < t.experts ? number * slots + place : rows, here = wanted < rows ? wanted : rows;
    row[i] = here;
    if (here < rows) choice[here] = i;
  });
}

Tiles tiles_of(const int64_t* expert, int64_t choices, int64_t first, int64_t experts, int32_t* space) {
  const int64_t tiles = sort_tiles(choices);
  return {expert, choices, first, sort_tile(choices), static_cast<int>(experts), static_cast<int>(tiles), space, space + (experts + 1) * tiles};
}

size_t shared_bytes(const Tiles& t) { return (static_cast<size_t>(t.experts) + 1) * sizeof(int); }

void count_tiles(const Tiles& t, int64_t* count, CUstream_st* stream) {
  count_kernel<<<t.tiles, 32, shared_bytes(t), stream>>>(t);
  scan_kernel<<<t.experts / 4 + 1, 128, 0, stream>>>(t, count);
}

}  // namespace

void sort_by_expert(const Sort& s, CUstream_st* stream) {
  const Tiles t = tiles_of(s.expert, s.choices, s.first, s.experts, s.space);
  count_tiles(t, nullptr, stream);
  place_kernel<<<t.tiles, 32, shared_bytes(t), stream>>>(t, s.choice, s.row, s.end, s.rows, s.slots);
  check_launch("sort_by_expert");
}

void count_by_expert(const Count& c, CUstream_st* stream) {
  count_tiles(tiles_of(c.expert, c.choices, c.first, c.experts, c.space), c.count, stream);
  check_launch("count_by_expert");
}

}  // namespace upcycle::cuda
