#pragma once
#include <functional>
#include <vector>

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

  /// The same in two waves (Route::waves), so that one's rows travel while the other's are multiplied: `begin` when the first wave's rows of x
  /// have arrived, `forward_rest` when all have. The result's rows of the first wave are made then; `rest` makes those of the second, before
  /// anyone reads them.
  Tensor begin(const Tensor& x_RD, const GroupedPart& first) const;
  struct Unfinished {
    Tensor y_RD;
    std::function<void()> rest;
  };
  Unfinished forward_rest(const Tensor& begun_RF, const Tensor& x_RD, const Tensor& weight_R1, const Tensor& end_L,
                          const std::vector<GroupedPart>& waves, Remade& remade);

 private:
  Tensor weighed_swiglu(const Tensor& gate_up_RF, const Tensor& weight_R1, Remade& remade) const;

  Parameter& gate_up_;
  Parameter& down_;
  GroupedKernels kernels_;
};

}  // namespace upcycle
