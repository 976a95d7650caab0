#pragma once
#include "base/autograd.hpp"
#include "ops/grouped_matmul.hpp"

// Shapes: R rows sorted by expert, L experts of this rank, F width of one expert here, D width of the model.
namespace upcycle {

/// The feed-forwards of this rank's experts, weighed: down(weight * silu(gate x) * up x), each map as one grouped product. With a width cut
/// over several ranks, this rank's part of that sum.
class Experts {
 public:
  /// `beside_transfers`: this rank exchanges something with others while it computes.
  Experts(Parameter& gate_up_LFD, Parameter& down_LDF, bool beside_transfers = false)
      : gate_up_(gate_up_LFD), down_(down_LDF), kernels_{.beside_transfers = beside_transfers} {}
  /// `x` [R, D] -> [R, D]; `weight_R1` fp32; `end_L` as in Route. Adds the product weight * silu(gate x) * up x to `remade`. The weight is
  /// multiplied in before the down map, which is linear: its output need not be kept for the weight's gradient.
  Tensor forward(const Tensor& x_RD, const Tensor& weight_R1, const Tensor& end_L, Remade& remade);

 private:
  Parameter& gate_up_;
  Parameter& down_;
  GroupedKernels kernels_;
};

}  // namespace upcycle
