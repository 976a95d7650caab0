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

int64_t grouped_gemm_workspace(int experts) { return bytes_of_groups(experts) + bytes_of_descriptors(processors()); }

void grouped_gemm(GroupedProduct product, GroupedTile tile, const GroupedGemm& g) {
  if (product == GroupedProduct::weight_gradient) return (tile == GroupedTile::wide ? weight_gradient_wide : weight_gradient_square)(g, processors());
  if (tile != GroupedTile::wide) throw std::logic_error("grouped_gemm: rows are multiplied with wide tiles only");
  return (product == GroupedProduct::forward ? forward_wide : input_gradient_wide)(g, processors());
}

}  // namespace upcycle::cuda
