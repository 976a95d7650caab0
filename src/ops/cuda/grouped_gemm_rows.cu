#include "ops/cuda/grouped_gemm.cuh"

namespace upcycle::cuda {

void forward_wide(const GroupedGemm& g, int blocks) {
  GroupedLaunch<GroupedProduct::forward, GroupedTile::wide>::run(g, blocks);
}
void input_gradient_wide(const GroupedGemm& g, int blocks) {
  GroupedLaunch<GroupedProduct::input_gradient, GroupedTile::wide>::run(g, blocks);
}

}  // namespace upcycle::cuda
