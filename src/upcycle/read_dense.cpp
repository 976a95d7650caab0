#include "upcycle/read_dense.hpp"

#include <c10/core/ScalarType.h>

namespace upcycle {

Tensor ReadDense::operator()(const std::string& name, const Box& box) const {
  if (each_.size() == 1) return each_.front()(name, box);
  Tensor sum = each_.front()(name, box).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  for (size_t i = 1; i < each_.size(); ++i) sum.add_(each_[i](name, box));
  return sum.div_(static_cast<double>(each_.size())).to(at::kFloat);
}

}  // namespace upcycle
