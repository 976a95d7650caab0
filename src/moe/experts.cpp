#include "moe/experts.hpp"

#include "base/trace_range.hpp"
#include "ops/swiglu.hpp"

namespace upcycle {

Tensor Experts::forward(const Tensor& x_RD, const Tensor& weight_R1, const Tensor& end_L, Remade& remade) {
  const TraceRange range("experts");
  const Tensor gate_up_RF = grouped_matmul(x_RD, gate_up_, end_L, kernels_), product_RF = swiglu(gate_up_RF, weight_R1);
  remade.add(product_RF, [gate_up_RF = gate_up_RF.detach(), weight_R1 = weight_R1.detach()] { return swiglu(gate_up_RF, weight_R1); });
  return grouped_matmul(product_RF, down_, end_L, kernels_);
}

}  // namespace upcycle
