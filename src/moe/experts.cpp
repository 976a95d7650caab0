#include "moe/experts.hpp"

#include "ops/grouped_matmul.hpp"
#include "ops/swiglu.hpp"

namespace upcycle {

Tensor Experts::forward(const Tensor& x_RD, const Tensor& end_L, Remade& remade) {
  const Tensor gate_up_RF = grouped_matmul(x_RD, gate_up_, end_L), product_RF = swiglu(gate_up_RF);
  remade.add(product_RF, [gate_up_RF = gate_up_RF.detach()] { return swiglu(gate_up_RF); });
  return grouped_matmul(product_RF, down_, end_L);
}

}  // namespace upcycle
