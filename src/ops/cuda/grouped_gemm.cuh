// One product of one tile's shape, of CUTLASS 4's parts. Each .cu file makes one or two: they take long to compile.
#pragma once
// Only what Hopper's grouped kernel is made of: CUTLASS's own collective_builder.hpp and gemm_universal.hpp bring in all architectures'.
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_array_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_cooperative.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_pingpong.hpp>

#include <type_traits>

#include "ops/cuda/grouped_gemm_launches.hpp"
#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {

/// A tile's way out of shared memory that adds instead of writing: the sum is made in the L2 cache, no block ever reads the old value.
/// One block adds to a number, once a launch, so that the order of the additions is that of the launches.
struct AddingStore : cute::SM90_TMA_STORE {};
struct AddingStoreTo : cute::SM90_TMA_STORE {};   ///< the same with a descriptor that lies in global memory

}  // namespace upcycle::cuda

namespace cute {

template <class Bits>
struct Copy_Traits<upcycle::cuda::AddingStoreTo, Bits> {
  using ThrID = Layout<_1>;
  using SrcLayout = Layout<Shape<_1, Bits>>;
  using DstLayout = SrcLayout;
  using RefLayout = SrcLayout;
  TmaDescriptor const* tma_desc_;

  template <class TS, class SLayout, class TD, class DLayout>
  CUTE_HOST_DEVICE friend constexpr void copy_unpack(Copy_Traits const& traits, Tensor<TS, SLayout> const& src, Tensor<TD, DLayout>& dst) {
    const void* descriptor = traits.tma_desc_;
    const void* from = cute::raw_pointer_cast(src.data());
    auto to = dst.data().coord_;
    return detail::explode_tuple(detail::CallCOPY<SM90_TMA_REDUCE_ADD>{}, make_tuple(descriptor, from), seq<0, 1>{}, to,
                                 tuple_seq<decltype(to)>{});
  }
};

template <class Bits, class AuxParams_>
struct Copy_Traits<upcycle::cuda::AddingStore, Bits, AuxParams_> {
  using ThrID = Layout<_1>;
  using SrcLayout = Layout<Shape<_1, Bits>>;
  using DstLayout = SrcLayout;
  using RefLayout = SrcLayout;
  using AuxParams = AuxParams_;
  TmaDescriptor tma_desc_;
  AuxParams aux_params_;

  CUTE_HOST_DEVICE constexpr TmaDescriptor const* get_tma_descriptor() const { return &tma_desc_; }
  template <class GShape>
  CUTE_HOST_DEVICE constexpr auto get_tma_tensor(GShape const& shape) const {
    return make_coord_tensor(make_layout(shape, aux_params_.g_stride_));
  }
  CUTE_HOST_DEVICE constexpr Copy_Traits<upcycle::cuda::AddingStoreTo, Bits> with(TmaDescriptor const* other) const { return {other}; }
};

}  // namespace cute

namespace upcycle::cuda {

using BFloat16 = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

/// As CUTLASS sees a product: A [M, K] times B [K, N].
template <GroupedProduct product>
struct Matrices;
template <>
struct Matrices<GroupedProduct::forward> {
  using A = RowMajor;      // rows of x
  using B = ColumnMajor;   // the transposed weight
  using Result = BFloat16;
};
template <>
struct Matrices<GroupedProduct::input_gradient> {
  using A = RowMajor;      // rows of dy
  using B = RowMajor;      // the weight
  using Result = BFloat16;
};
template <>
struct Matrices<GroupedProduct::weight_gradient> {
  using A = ColumnMajor;   // dy, transposed: K are the expert's rows, and their number may be any
  using B = RowMajor;      // rows of x
  using Result = float;
};
template <>
struct Matrices<GroupedProduct::added_weight_gradient> : Matrices<GroupedProduct::weight_gradient> {};

template <GroupedTile tile>
struct Schedule;
template <>
struct Schedule<GroupedTile::wide> {
  using Shape = cute::Shape<cute::Int<Tiles::kHeight>, cute::Int<Tiles::width(GroupedTile::wide)>, cute::_64>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
template <>
struct Schedule<GroupedTile::square> {
  using Shape = cute::Shape<cute::Int<Tiles::kHeight>, cute::Int<Tiles::width(GroupedTile::square)>, cute::_64>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

/// An epilogue of CUTLASS's, with another way out.
template <class Collective>
struct Adding;
template <class Policy, class Tile, class Subtile, class C, class StrideC, class D, class StrideD, class Fusion, class LoadC, class LayoutC,
          class ReadC, class StoreD, class LayoutD, class WriteD, class AtomC, class Transform>
struct Adding<cutlass::epilogue::collective::CollectiveEpilogue<Policy, Tile, Subtile, C, StrideC, D, StrideD, Fusion, LoadC, LayoutC, ReadC,
                                                                StoreD, LayoutD, WriteD, AtomC, Transform>> {
  using type = cutlass::epilogue::collective::CollectiveEpilogue<Policy, Tile, Subtile, C, StrideC, D, StrideD, Fusion, LoadC, LayoutC, ReadC,
                                                                 AddingStore, LayoutD, WriteD, AtomC, Transform>;
};

/// A node of an epilogue (CUTLASS's "epilogue visitor tree"): hands on what it is given, and sums its squares. Each warp of a tile writes one
/// sum, to a place of its own: the same numbers in the same order each time. What lies outside the matrix is zero.
template <GroupedTile tile>
struct SquareSums : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  struct Arguments {
    double* sums = nullptr;   ///< [experts, tiles.m, tiles.n, tiles.warps]; null: not wanted
    Tiles tiles = {};
  };
  using Params = Arguments;
  using SharedStorage = cutlass::epilogue::fusion::Sm90VisitorImpl<>::SharedStorage;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE SquareSums() {}
  CUTLASS_HOST_DEVICE SquareSums(const Params& params, const SharedStorage&) : params(params) {}
  Params params;

  struct ConsumerStoreCallbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    double* mine;     ///< of this warp and tile
    int lane;
    float part = 0;   ///< of one part of the tile
    double sum = 0;
    CUTLASS_DEVICE ConsumerStoreCallbacks(double* mine, int lane) : mine(mine), lane(lane) {}

    template <class Accumulator, class Input, int kSize>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, kSize>&, int, int, int, const cutlass::Array<Input, kSize>& x) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) part = __fmaf_rn(x[i], x[i], part);
      return x;
    }
    CUTLASS_DEVICE void end_loop(int, int) {
      sum += part;
      part = 0;
    }
    CUTLASS_DEVICE void end() {
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (mine && lane == 0) *mine = sum;
    }
  };

  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    const auto [m, n, k, expert] = args.tile_coord_mnkl;
    const Tiles& tiles = params.tiles;
    const int64_t place = ((expert * tiles.m + m) * tiles.n + n) * tiles.warps + args.thread_idx / 32;
    return ConsumerStoreCallbacks(params.sums ? params.sums + place : nullptr, args.thread_idx % 32);
  }
};

/// What happens to a tile between the product and its way out.
template <GroupedProduct product, GroupedTile tile>
struct Fusion {
  using type = cutlass::epilogue::fusion::LinearCombination<typename Matrices<product>::Result, float, void>;
};
template <GroupedTile tile>
struct Fusion<GroupedProduct::weight_gradient, tile> {
  using type = cutlass::epilogue::fusion::Sm90EVT<SquareSums<tile>, cutlass::epilogue::fusion::Sm90AccFetch>;
};

template <GroupedProduct product, GroupedTile tile>
struct GroupedKernel {
  using M = Matrices<product>;
  using S = Schedule<tile>;
  using Cluster = cute::Shape<cute::Int<Tiles::kClusterHeight>, cute::_1, cute::_1>;   // two blocks, one above the other, share B
  using Problem = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  static constexpr int kAlignment = 8, kResultAlignment = 16 / sizeof(typename M::Result);

  using Storing = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename S::Shape, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, RowMajor*, kResultAlignment, typename M::Result, RowMajor*, kResultAlignment, typename S::Epilogue,
      typename Fusion<product, tile>::type>::CollectiveOp;
  using Epilogue = typename std::conditional_t<product == GroupedProduct::added_weight_gradient, Adding<Storing>, std::type_identity<Storing>>::type;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BFloat16, typename M::A*, kAlignment, BFloat16, typename M::B*, kAlignment, float,
      typename S::Shape, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename S::Mainloop>::CollectiveOp;
  using type = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
};

/// What CUTLASS reads of each group, on the device. Strides are one number each: the other is 1.
struct Groups {
  cute::Shape<int, int, int>* size;
  const BFloat16** a;
  const BFloat16** b;
  void** d;
  int64_t *stride_a, *stride_b, *stride_d;
};

inline Groups groups_in(void* memory, int experts) {
  static_assert(sizeof(cute::Shape<int, int, int>) == 12);
  char* at = static_cast<char*>(memory);
  const auto take = [&] {
    char* mine = at;
    at += bytes_of_groups(experts) / 7;
    return mine;
  };
  Groups groups;
  groups.size = reinterpret_cast<cute::Shape<int, int, int>*>(take());
  groups.a = reinterpret_cast<const BFloat16**>(take());
  groups.b = reinterpret_cast<const BFloat16**>(take());
  groups.d = reinterpret_cast<void**>(take());
  groups.stride_a = reinterpret_cast<int64_t*>(take());
  groups.stride_b = reinterpret_cast<int64_t*>(take());
  groups.stride_d = reinterpret_cast<int64_t*>(take());
  return groups;
}

__device__ inline int rows_of(const GroupedGemm& g, int expert) { return g.end[expert] - (expert == 0 ? 0 : g.end[expert - 1]); }

/// What no tile will overwrite.
__device__ inline void zero_experts_without_rows(const GroupedGemm& g, int64_t square_sums) {
  const int64_t vectors = g.in * g.out / 4, step = int64_t{gridDim.x} * blockDim.x, thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int threads = static_cast<int>(blockDim.x);
  for (int first = 0; first < g.experts; first += threads) {
    const int own = first + static_cast<int>(threadIdx.x);
    if (!__syncthreads_or(own < g.experts && rows_of(g, own) == 0)) continue;
    for (int e = first; e < g.experts && e < first + threads; ++e) {
      if (rows_of(g, e) > 0) continue;
      float4* const matrix = reinterpret_cast<float4*>(static_cast<float*>(g.result) + e * g.in * g.out);
      for (int64_t i = thread; i < vectors; i += step) matrix[i] = float4{};
      for (int64_t i = thread; g.squares && i < square_sums; i += step) g.squares[e * square_sums + i] = 0;
    }
  }
}

/// One block describes; for weight gradients that are written all blocks zero what has no rows.
template <GroupedProduct product>
__global__ void describe_groups(GroupedGemm g, Groups groups, int64_t square_sums) {
  if constexpr (product == GroupedProduct::weight_gradient) {
    zero_experts_without_rows(g, square_sums);
    if (blockIdx.x > 0) return;
  }
  const auto* left = static_cast<const BFloat16*>(g.left);
  const auto* right = static_cast<const BFloat16*>(g.right);
  const int in = static_cast<int>(g.in), out = static_cast<int>(g.out);
  for (int e = threadIdx.x; e < g.experts; e += blockDim.x) {
    const int64_t begin = e == 0 ? 0 : g.end[e - 1], matrix = e * g.in * g.out;
    const int rows = g.end[e] - static_cast<int>(begin);
    if constexpr (product == GroupedProduct::forward) {
      groups.size[e] = cute::make_shape(rows, out, in);
      groups.a[e] = left + begin * in, groups.stride_a[e] = in;
      groups.b[e] = right + matrix, groups.stride_b[e] = in;
      groups.d[e] = static_cast<BFloat16*>(g.result) + begin * out, groups.stride_d[e] = out;
    } else if constexpr (product == GroupedProduct::input_gradient) {
      groups.size[e] = cute::make_shape(rows, in, out);
      groups.a[e] = left + begin * out, groups.stride_a[e] = out;
      groups.b[e] = right + matrix, groups.stride_b[e] = in;
      groups.d[e] = static_cast<BFloat16*>(g.result) + begin * in, groups.stride_d[e] = in;
    } else {
      // No tiles at all where there is no row.
      groups.size[e] = rows > 0 ? cute::make_shape(out, in, rows) : cute::make_shape(0, 0, 0);
      groups.a[e] = left + begin * out, groups.stride_a[e] = out;
      groups.b[e] = right + begin * in, groups.stride_b[e] = in;
      groups.d[e] = static_cast<float*>(g.result) + matrix, groups.stride_d[e] = in;
    }
  }
}

/// Tiles are taken in strips so many wide, that neighbours in time find both their factors in the L2 cache. A strip must divide all of the
/// result's tiles: CUTLASS computes those that are missing, too.
inline int strip_of(int64_t tiles_m, int64_t tiles_n, int cluster_m) {
  int log = 3;
  while (log > 0 && (tiles_m % (cluster_m << log) != 0 || tiles_n % (1 << log) != 0)) --log;
  return log;
}

template <GroupedProduct product, GroupedTile tile>
struct GroupedLaunch {
  using Kernel = typename GroupedKernel<product, tile>::type;
  static_assert(sizeof(typename Kernel::InternalStrideA) == 8 && sizeof(typename Kernel::InternalStrideB) == 8 &&
                sizeof(typename Kernel::InternalStrideD) == 8);

  static typename Kernel::Arguments arguments(const GroupedGemm& g, const Groups& groups, int blocks) {
    using D = typename Kernel::ElementD;
    typename Kernel::Arguments a;
    a.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    a.problem_shape = {g.experts, groups.size, nullptr};
    a.mainloop = {groups.a, reinterpret_cast<typename Kernel::StrideA>(groups.stride_a), groups.b,
                  reinterpret_cast<typename Kernel::StrideB>(groups.stride_b)};
    if constexpr (product == GroupedProduct::weight_gradient) a.epilogue.thread = {{}, {g.squares, Tiles::of(tile, g.out, g.in)}};
    a.epilogue.ptr_D = reinterpret_cast<D**>(groups.d);
    a.epilogue.dD = reinterpret_cast<typename Kernel::StrideD>(groups.stride_d);
    a.hw_info.device_id = 0;   // only asked for the number of processors
    a.hw_info.sm_count = blocks;   // all that CUTLASS takes from it is how many to launch
    return a;
  }

  static void run(const GroupedGemm& g, int blocks) {
    const Groups groups = groups_in(g.workspace, g.experts);
    const bool zeroes = product == GroupedProduct::weight_gradient;
    const int threads = zeroes || g.experts > 256 ? 256 : (g.experts + 31) / 32 * 32;
    describe_groups<product><<<zeroes ? blocks : 1, threads, 0, g.stream>>>(g, groups, square_sums_of_expert(tile, g.out, g.in));
    check_launch("describe_groups");
    const auto args = arguments(g, groups, blocks);
    if (static_cast<int64_t>(Kernel::get_workspace_size(args)) > bytes_of_descriptors(blocks)) {
      throw std::logic_error("grouped_gemm: CUTLASS wants more memory than it is given");
    }
    auto params = Kernel::to_underlying_arguments(args, static_cast<char*>(g.workspace) + bytes_of_groups(g.experts));
    if constexpr (std::is_same_v<typename Matrices<product>::Result, float>) {
      using Shape = typename Kernel::TileShape;
      const auto tiles = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
      params.scheduler.log_swizzle_size_ =
          strip_of(tiles(g.out, cute::size<0>(Shape{})), tiles(g.in, cute::size<1>(Shape{})), cute::size<0>(typename Kernel::ClusterShape{}));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = g.stream;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {cute::size<0>(typename Kernel::ClusterShape{}), cute::size<1>(typename Kernel::ClusterShape{}), 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    static const cudaError_t allowed = cudaFuncSetAttribute(cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                            Kernel::SharedStorageSize);
    if (allowed != cudaSuccess) throw std::runtime_error(std::string("grouped_gemm: ") + cudaGetErrorString(allowed));
    cudaLaunchKernelEx(&config, cutlass::device_kernel<Kernel>, params);
    check_launch("grouped_gemm");
  }
};

}  // namespace upcycle::cuda
