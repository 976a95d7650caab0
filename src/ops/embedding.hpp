#pragma once
#include "ops/parameter.hpp"

namespace upcycle {

/// Rows of weight.value [V, D] for int64 ids of any shape; result [..., D]. Backward adds into weight.main_grad in a fixed order.
Tensor embedding(const Tensor& ids, Parameter& weight_VD);

/// The same where `weight` holds the rows of ids first .. first + V - 1 only: zeros for all others.
Tensor embedding_part(const Tensor& ids, Parameter& weight_VD, int64_t first);

}  // namespace upcycle
