#include "ops/cuda/grouped_gemm.cuh"

namespace upcycle::cuda {

void weight_gradient_wide(const GroupedGemm& g, int processors) {
  GroupedLaunch<GroupedProduct::weight_gradient, GroupedTile::wide>::run(g, processors);
}
void weight_gradient_square(const GroupedGemm& g, int processors) {
  GroupedLaunch<GroupedProduct::weight_gradient, GroupedTile::square>::run(g, processors);
}

}  // namespace upcycle::cuda
