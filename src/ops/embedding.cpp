#include "ops/embedding.hpp"

#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>

#include "base/autograd.hpp"

namespace upcycle {

Tensor embedding(const Tensor& ids, Parameter& weight) {
  Tensor y;
  {
    const Unrecorded guard;
    y = at::embedding(weight.arrived(), ids);
  }
  // No input is differentiable; record() puts the op into the graph all the same.
  return record(y, {}, [ids, &weight](const std::vector<Tensor>& dy) -> Gradients {
    // ATen's backward sorts the ids, so that equal ones are added in one order (index_add_ would use atomics on CUDA).
    weight.main_grad.add_(at::embedding_dense_backward(dy[0].to(at::kFloat), ids, weight.value.size(0), -1, false));
    weight.ready();
    return {};
  });
}

Tensor embedding_part(const Tensor& ids, Parameter& weight, int64_t first) {
  const int64_t rows = weight.value.size(0);
  const Tensor row = ids - first;
  const Tensor mine = row.ge(0).logical_and(row.lt(rows)).unsqueeze(-1);
  const Tensor y = embedding(row.clamp(0, rows - 1), weight);   // foreign ids read some row, and come out as zeros
  return y * mine.to(y.scalar_type());
}

}  // namespace upcycle
