// Between grouped_gemm.cu and the files of the single kernels.
#pragma once
#include "ops/cuda/grouped_gemm.hpp"

namespace upcycle::cuda {

/// Of the sizes, addresses and strides of all groups.
inline int64_t bytes_of_groups(int experts) { return 7 * ((12LL * experts + 255) / 256 * 256); }
/// CUTLASS's descriptors: A, B and at most two of the result for each block; a few for rounding.
inline int64_t bytes_of_descriptors(int blocks) { return 128LL * 4 * blocks + 1024; }

/// Tiles of one expert's weight gradient, those too many that fill the last cluster included, and the warps that share each.
struct Tiles {
  static constexpr int kHeight = 128, kClusterHeight = 2;
  int64_t m, n;
  int warps;
  static constexpr int width(GroupedTile tile) { return tile == GroupedTile::wide ? 256 : 128; }
  static Tiles of(GroupedTile tile, int64_t out, int64_t in) {
    constexpr int kCluster = kHeight * kClusterHeight;
    return {(out + kCluster - 1) / kCluster * kClusterHeight, (in + width(tile) - 1) / width(tile), tile == GroupedTile::wide ? 8 : 4};
  }
};

void forward_wide(const GroupedGemm&, int blocks);
void input_gradient_wide(const GroupedGemm&, int blocks);
void weight_gradient_wide(const GroupedGemm&, int blocks);
void weight_gradient_square(const GroupedGemm&, int blocks);
void added_weight_gradient_wide(const GroupedGemm&, int blocks);
void added_weight_gradient_square(const GroupedGemm&, int blocks);

}  // namespace upcycle::cuda
