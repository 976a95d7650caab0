#include "model/gathered_linear.hpp"

#include "ops/linear.hpp"
#include "parallel/regions.hpp"

namespace upcycle {

std::pair<Tensor, Tensor> gathered_linear(const Communicator& tensor, const Tensor& x_WD, Parameter& weight, Remade& remade) {
  if (tensor.size() == 1) return {x_WD, linear(x_WD, weight)};
  BegunProduct begun;
  const Tensor x_TD = gather_along(tensor, x_WD, 0, [&] {
    begun = begin_linear(tensor.size() * x_WD.size(0), tensor.rank() * x_WD.size(0), x_WD.detach(), weight);
  });
  remade.add(x_TD, [&tensor, x = x_WD.detach()] { return gather_along(tensor, x, 0); });
  return {x_TD, linear(x_TD, weight, begun)};
}

}  // namespace upcycle
