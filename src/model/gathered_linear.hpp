#pragma once
#include <utility>

#include "base/autograd.hpp"
#include "ops/parameter.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// **Collective** over `tensor`. Where sequence parallelism enters a matrix whose rows are split between tensor ranks: `x` [W, D], this rank's
/// tokens, becomes all tokens' [T, D], and their product [T, O] with this rank's part of the weight. Backward: linear's, and the sum of
/// all ranks' gradients of x. On a GPU the own tokens are multiplied while the others' travel. The gathered ones are added to `remade`.
std::pair<Tensor, Tensor> gathered_linear(const Communicator& tensor, const Tensor& x_WD, Parameter& weight, Remade& remade);

}  // namespace upcycle
