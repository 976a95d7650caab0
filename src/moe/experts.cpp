#include "moe/experts.hpp"

#include "ops/grouped_matmul.hpp"
#include "ops/swiglu.hpp"

namespace upcycle {

Tensor Experts::forward(const Tensor& x_RD, const Tensor& end_L) {
  const Tensor gate_up_RF = grouped_matmul(x_RD, gate_up_, end_L);
  return grouped_matmul(swiglu(gate_up_RF), down_, end_L);
}

}  // namespace upcycle
