#pragma once
#include "ops/parameter.hpp"

// Shapes: V rows of D numbers, N ids.
namespace upcycle {

/// Rows of weight.value [V, D] for int64 ids of any shape; result [..., D]. Backward adds into weight.main_grad in a fixed order.
Tensor embedding(const Tensor& ids, Parameter& weight_VD);

/// The same where `weight` holds the rows of ids first .. first + V - 1 only: zeros for all others.
Tensor embedding_part(const Tensor& ids, Parameter& weight_VD, int64_t first);

/// main_grad [V, D] (fp32): row ids[n] += dy[n], summed in fp32 in a fixed order. On a GPU the ids are sorted and only their rows touched.
void add_embedding_gradient(Tensor main_grad_VD, const Tensor& dy_ND, const Tensor& ids_N);
/// The plain form, on any device: makes a whole table first.
void add_embedding_gradient_written_out(Tensor main_grad_VD, const Tensor& dy_ND, const Tensor& ids_N);

}  // namespace upcycle
