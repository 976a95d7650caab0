#include "ops/cuda/grouped_gemm.cuh"

namespace upcycle::cuda {

void added_weight_gradient_wide(const GroupedGemm& g, int processors) {
  GroupedLaunch<GroupedProduct::added_weight_gradient, GroupedTile::wide>::run(g, processors);
}
void added_weight_gradient_square(const GroupedGemm& g, int processors) {
  GroupedLaunch<GroupedProduct::added_weight_gradient, GroupedTile::square>::run(g, processors);
}

}  // namespace upcycle::cuda
