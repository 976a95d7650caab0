#include "model/gathered_linear.hpp"

#include <ATen/ops/empty.h>

#include "ops/linear.hpp"
#include "parallel/regions.hpp"

namespace upcycle {

std::pair<Tensor, Tensor> gathered_linear(const Communicator& tensor, const Tensor& x_WD, Parameter& weight, Remade& remade) {
  if (tensor.size() == 1) return {x_WD, linear(x_WD, weight)};
  const int64_t own = x_WD.size(0), begin = tensor.rank() * own, end = begin + own;
  Tensor y_TO;
  const auto multiply = [&](const Tensor& rows_D, int64_t first) {
    const Unrecorded guard;
    if (rows_D.size(0) > 0) matrix_product_into(y_TO.narrow(0, first, rows_D.size(0)), rows_D, weight.value.t());
  };
  const Tensor x_TD = gather_along(tensor, x_WD, 0, [&] {
    y_TO = at::empty({tensor.size() * own, weight.value.size(0)}, weight.arrived().options());
    multiply(x_WD.detach(), begin);
  });
  multiply(x_TD.detach().narrow(0, 0, begin), 0);
  multiply(x_TD.detach().narrow(0, end, x_TD.size(0) - end), end);
  remade.add(x_TD, [&tensor, x = x_WD.detach()] { return gather_along(tensor, x, 0); });
  return {x_TD, linear(x_TD, weight, y_TO)};
}

}  // namespace upcycle
