#pragma once
#include "ops/parameter.hpp"

namespace upcycle {

/// Rows of weight.value [V, D] for int64 ids of any shape; result [..., D]. Backward adds into weight.main_grad in a fixed order.
Tensor embedding(const Tensor& ids, Parameter& weight_VD);

}  // namespace upcycle
