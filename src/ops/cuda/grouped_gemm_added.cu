#include "ops/cuda/grouped_gemm.cuh"

namespace upcycle::cuda {

void added_weight_gradient_wide(const GroupedGemm& g, int blocks) {
  GroupedLaunch<GroupedProduct::added_weight_gradient, GroupedTile::wide>::run(g, blocks);
}
void added_weight_gradient_square(const GroupedGemm& g, int blocks) {
  GroupedLaunch<GroupedProduct::added_weight_gradient, GroupedTile::square>::run(g, blocks);
}

}  // namespace upcycle::cuda
