#include "ops/cuda/grouped_gemm.cuh"

namespace upcycle::cuda {

void weight_gradient_wide(const GroupedGemm& g, int blocks) {
  GroupedLaunch<GroupedProduct::weight_gradient, GroupedTile::wide>::run(g, blocks);
}
void weight_gradient_square(const GroupedGemm& g, int blocks) {
  GroupedLaunch<GroupedProduct::weight_gradient, GroupedTile::square>::run(g, blocks);
}

}  // namespace upcycle::cuda
