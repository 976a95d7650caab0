#include "moe/experts.hpp"

#include <ATen/ops/empty.h>

#include "base/trace_range.hpp"
#include "ops/swiglu.hpp"

namespace upcycle {
namespace {

Tensor room(const Tensor& x_RI, const Parameter& weight_LOI) { return at::empty({x_RI.size(0), weight_LOI.value.size(1)}, x_RI.options()); }

/// A wave's rows of a product with `weight`, into those of `y`.
void multiply(const Tensor& y_RO, const Tensor& x_RI, const Parameter& weight_LOI, const GroupedPart& wave) {
  const Unrecorded guard;
  grouped_product_into(y_RO, x_RI.detach(), weight_LOI.arrived(), wave, /*beside_transfers=*/true);
}

}  // namespace

Tensor Experts::forward(const Tensor& x_RD, const Tensor& weight_R1, const Tensor& end_L, Remade& remade) {
  const TraceRange range("experts");
  const Tensor product_RF = weighed_swiglu(grouped_matmul(x_RD, gate_up_, end_L, kernels_), weight_R1, remade);
  return grouped_matmul(product_RF, down_, end_L, kernels_);
}

Tensor Experts::begin(const Tensor& x_RD, const GroupedPart& first) const {
  const TraceRange range("experts");
  const Tensor gate_up_RF = room(x_RD, gate_up_);
  multiply(gate_up_RF, x_RD, gate_up_, first);
  return gate_up_RF;
}

Experts::Unfinished Experts::forward_rest(const Tensor& begun_RF, const Tensor& x_RD, const Tensor& weight_R1, const Tensor& end_L,
                                          const std::vector<GroupedPart>& waves, Remade& remade) {
  const TraceRange range("experts");
  multiply(begun_RF, x_RD, gate_up_, waves[1]);
  const Tensor product_RF = weighed_swiglu(grouped_matmul(x_RD, gate_up_, end_L, kernels_, begun_RF), weight_R1, remade);
  const Tensor y_RD = room(product_RF, down_);
  multiply(y_RD, product_RF, down_, waves[0]);
  return {grouped_matmul(product_RF, down_, end_L, kernels_, y_RD), [this, y_RD, product_RF, last = waves[1]] { multiply(y_RD, product_RF, down_, last); }};
}

Tensor Experts::weighed_swiglu(const Tensor& gate_up_RF, const Tensor& weight_R1, Remade& remade) const {
  const Tensor product_RF = swiglu(gate_up_RF, weight_R1);
  remade.add(product_RF, [gate_up_RF = gate_up_RF.detach(), weight_R1 = weight_R1.detach()] { return swiglu(gate_up_RF, weight_R1); });
  return product_RF;
}

}  // namespace upcycle
