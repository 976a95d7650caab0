#include "ops/embedding.hpp"

#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/sort.h>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/embedding.hpp"

namespace upcycle {

void add_embedding_gradient_written_out(Tensor main_grad_VD, const Tensor& dy_ND, const Tensor& ids_N) {
  // ATen's backward sorts the ids, so that equal ones are added in one order (index_add_ would use atomics on CUDA).
  main_grad_VD.add_(at::embedding_dense_backward(dy_ND.to(at::kFloat), ids_N, main_grad_VD.size(0), -1, false));
}

void add_embedding_gradient(Tensor main_grad_VD, const Tensor& dy_ND, const Tensor& ids_N) {
  const bool bf16 = dy_ND.scalar_type() == at::kBFloat16;
  if (!dy_ND.is_cuda() || !main_grad_VD.is_contiguous() || !(bf16 || dy_ND.scalar_type() == at::kFloat)) {
    return add_embedding_gradient_written_out(main_grad_VD, dy_ND, ids_N);
  }
  const Unrecorded guard;
  const Tensor rows_ND = dy_ND.contiguous();
  const auto [sorted_N, order_N] = at::sort(ids_N, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  cuda::EmbeddingGradient p{};
  p.dy = rows_ND.const_data_ptr(), p.bf16 = bf16;
  p.rows = rows_ND.size(0), p.width = rows_ND.size(1);
  p.sorted = sorted_N.const_data_ptr<int64_t>(), p.order = order_N.const_data_ptr<int64_t>();
  p.gradients = main_grad_VD.mutable_data_ptr<float>();
  cuda::add_embedding_gradient(p, device::current_stream(rows_ND.device()));
}

Tensor embedding(const Tensor& ids, Parameter& weight) {
  Tensor y;
  {
    const Unrecorded guard;
    y = at::embedding(weight.arrived(), ids);
  }
  // No input is differentiable; record() puts the op into the graph all the same.
  return record(y, {}, [ids, &weight](const std::vector<Tensor>& dy) -> Gradients {
    add_embedding_gradient(weight.sums(), dy[0].reshape({-1, weight.value.size(1)}), ids.reshape({-1}));
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
