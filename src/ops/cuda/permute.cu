// Both ways go token by token, so that the side with fewer rows is touched once. Bytes moved for T tokens of K rows of D numbers of w
// bytes: (1 + K) T D w, and 8 T K for the rows' numbers; T D w more where sums are added onto something.
#include "ops/cuda/permute.hpp"

#include <algorithm>
#include <type_traits>

#include "ops/cuda/rows.cuh"

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;                    // rows of a token that are on their way together
constexpr int64_t kMostItems = 2'000'000'000;   // of one launch: they are counted in 32 bits

/// An item is a unit of a row of x: a thread's work. All choices of its token get it.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_kernel(const Unit* __restrict__ x, const int64_t* __restrict__ row, Unit* __restrict__ y,
                                                        uint32_t items, Division units, int choices, int rows) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const uint32_t token = units.of(item), column = item - token * units.by();
  const int64_t* const of_token = row + static_cast<int64_t>(token) * choices;
  const Unit value = x[item];
#pragma unroll 1
  for (int first = 0; first < choices; first += kAtOnce) {
    int to[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) to[k] = first + k < choices ? static_cast<int>(of_token[first + k]) : rows;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (to[k] < rows) y[static_cast<int64_t>(to[k]) * units.by() + column] = value;
    }
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) zero_kernel(const int64_t* __restrict__ choice, Unit* __restrict__ y, uint32_t items, Division units,
                                                        int64_t no_choice) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item < items && choice[units.of(item)] >= no_choice) y[item] = Unit{};
}

/// What kLanes numbers are until they are looked at: as whole words they take the fewest registers.
template <int bytes>
struct UnitOf;
template <>
struct UnitOf<16> : std::type_identity<uint4> {};
template <>
struct UnitOf<4> : std::type_identity<uint32_t> {};
template <>
struct UnitOf<2> : std::type_identity<uint16_t> {};

/// An item is kLanes numbers of a row of x: their sums over the token's rows, and what they are added onto.
template <typename In, typename Out, int kLanes>
__global__ void __launch_bounds__(kThreads, 5) sum_kernel(const In* __restrict__ y, const int64_t* __restrict__ row,
                                                       const Out* __restrict__ onto, Out* __restrict__ x, uint32_t items, Division units, int choices, int rows) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= items) return;
  const uint32_t token = units.of(item), column = item - token * units.by();
  const int64_t* const of_token = row + static_cast<int64_t>(token) * choices;
  using Unit = typename UnitOf<sizeof(In) * kLanes>::type;
  const Unit* const parts = reinterpret_cast<const Unit*>(y);
  Lanes<Out, kLanes> last;
  if (onto) last = reinterpret_cast<const Lanes<Out, kLanes>*>(onto)[item];   // on its way meanwhile
  float sum[kLanes] = {};
#pragma unroll 1
  for (int first = 0; first < choices; first += kAtOnce) {
    int from[kAtOnce];
    Unit part[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) from[k] = first + k < choices ? static_cast<int>(of_token[first + k]) : rows;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (from[k] < rows) part[k] = parts[static_cast<int64_t>(from[k]) * units.by() + column];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (from[k] >= rows) continue;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) sum[i] += as_float(reinterpret_cast<const Lanes<In, kLanes>&>(part[k]).lane[i]);
    }
  }
  if (onto) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum[i] += as_float(last.lane[i]);
  }
  Lanes<Out, kLanes> out;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) out.lane[i] = rounded<Out>(sum[i]);
  reinterpret_cast<Lanes<Out, kLanes>*>(x)[item] = out;
}

/// launch(first row, items): all rows, as many at a time as have numbers for their items.
template <class Launch>
void in_slices(int64_t rows, int64_t units, Launch&& launch) {
  const int64_t most = std::max<int64_t>(1, kMostItems / units);
  for (int64_t first = 0; first < rows; first += most) launch(first, static_cast<uint32_t>(std::min(most, rows - first) * units));
}

template <typename Unit>
void copy_units(const RowCopies& c, CUstream_st* stream) {
  const int64_t width = c.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const Division units(static_cast<uint32_t>(width));
  Unit* const y = static_cast<Unit*>(c.y);
  in_slices(c.tokens, width, [&](int64_t first, uint32_t items) {
    copy_kernel<Unit><<<blocks_of(items, kThreads), kThreads, 0, stream>>>(
        static_cast<const Unit*>(c.x) + first * width, c.row + first * c.choices, y, items, units, static_cast<int>(c.choices),
        static_cast<int>(c.rows));
  });
  if (!c.choice) return;
  in_slices(c.rows, width, [&](int64_t first, uint32_t items) {
    zero_kernel<Unit><<<blocks_of(items, kThreads), kThreads, 0, stream>>>(c.choice + first, y + first * width, items, units,
                                                                           c.tokens * c.choices);
  });
}

template <typename In, typename Out>
void sum_kinds(const RowSums& s, CUstream_st* stream) {
  const auto by_lanes = [&]<int kLanes>() {
    const int64_t width = s.width / kLanes;
    const Division units(static_cast<uint32_t>(width));
    in_slices(s.tokens, width, [&](int64_t first, uint32_t items) {
      sum_kernel<In, Out, kLanes><<<blocks_of(items, kThreads), kThreads, 0, stream>>>(
          static_cast<const In*>(s.y), s.row + first * s.choices, s.onto ? static_cast<const Out*>(s.onto) + first * s.width : nullptr,
          static_cast<Out*>(s.x) + first * s.width, items, units,
          static_cast<int>(s.choices), static_cast<int>(s.rows));
    });
  };
  if (in_vectors(s.y, s.width * static_cast<int64_t>(sizeof(In))) && in_vectors(s.x, s.width * static_cast<int64_t>(sizeof(Out))) &&
      in_vectors(s.onto, s.width * static_cast<int64_t>(sizeof(Out)))) {
    by_lanes.template operator()<kVectorLanes<In>>();
  } else {
    by_lanes.template operator()<1>();
  }
}

}  // namespace

void copy_rows(const RowCopies& c, CUstream_st* stream) {
  if (c.rows * c.row_bytes == 0) return;
  if (in_vectors(c.x, c.row_bytes) && in_vectors(c.y, c.row_bytes)) {
    copy_units<uint4>(c, stream);
  } else if (c.number_bytes == 4) {
    copy_units<uint32_t>(c, stream);
  } else {
    copy_units<uint16_t>(c, stream);
  }
  check_launch("copy_rows");
}

void sum_rows(const RowSums& s, CUstream_st* stream) {
  if (s.tokens * s.width == 0) return;
  if (s.bf16 && s.bf16_out) sum_kinds<__nv_bfloat16, __nv_bfloat16>(s, stream);
  if (s.bf16 && !s.bf16_out) sum_kinds<__nv_bfloat16, float>(s, stream);
  if (!s.bf16) sum_kinds<float, float>(s, stream);
  check_launch("sum_rows");
}

}  // namespace upcycle::cuda
