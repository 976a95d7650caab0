#include "ops/cuda/grouped_gemm.cuh"

namespace upcycle::cuda {

void forward_wide(const GroupedGemm& g, int processors) {
  GroupedLaunch<GroupedProduct::forward, GroupedTile::wide>::run(g, processors);
}
void input_gradient_wide(const GroupedGemm& g, int processors) {
  GroupedLaunch<GroupedProduct::input_gradient, GroupedTile::wide>::run(g, processors);
}

}  // namespace upcycle::cuda
