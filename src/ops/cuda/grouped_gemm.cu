#include <stdexcept>

#include "ops/cuda/grouped_gemm_launches.hpp"
#include "ops/cuda/launch.cuh"

namespace upcycle::cuda {
namespace {

int attribute(cudaDeviceAttr which) {
  int gpu = 0, value = 0;
  if (cudaGetDevice(&gpu) != cudaSuccess || cudaDeviceGetAttribute(&value, which, gpu) != cudaSuccess) {
    throw std::runtime_error("grouped_gemm: the GPU does not answer");
  }
  return value;
}

int processors() { return attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace

bool has_grouped_gemm() {
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

int64_t grouped_gemm_workspace(int experts, int rounds) { return bytes_of_groups(experts) + bytes_of_descriptors(processors() * rounds); }

int64_t square_sums_of_expert(GroupedTile tile, int64_t out, int64_t in) {
  const Tiles tiles = Tiles::of(tile, out, in);
  return tiles.m * tiles.n * tiles.warps;
}

void grouped_gemm(GroupedProduct product, GroupedTile tile, const GroupedGemm& g) {
  const bool wide = tile == GroupedTile::wide;
  const auto kernel = [&] {
    switch (product) {
      case GroupedProduct::forward: return wide ? forward_wide : nullptr;
      case GroupedProduct::input_gradient: return wide ? input_gradient_wide : nullptr;
      case GroupedProduct::weight_gradient: return wide ? weight_gradient_wide : weight_gradient_square;
      case GroupedProduct::added_weight_gradient: return wide ? added_weight_gradient_wide : added_weight_gradient_square;
    }
    throw std::logic_error("grouped_gemm: no such product");
  }();
  if (!kernel) throw std::logic_error("grouped_gemm: rows are multiplied with wide tiles only");
  if (g.squares && product != GroupedProduct::weight_gradient) throw std::logic_error("grouped_gemm: squares are summed of what is written");
  kernel(g, processors() * g.rounds);
}

}  // namespace upcycle::cuda
