#include "model/vocabulary.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <stdexcept>

#include "base/autograd.hpp"
#include "ops/cross_entropy.hpp"
#include "ops/embedding.hpp"
#include "ops/linear.hpp"
#include "parallel/regions.hpp"

namespace upcycle {
namespace {

/// Of the whole vocabulary: each rank's sums scaled to the largest logit of all.
SoftmaxSums over_ranks(const Communicator& tensor, const SoftmaxSums& own) {
  if (tensor.size() == 1) return own;
  Tensor largest_N = own.largest_T.clone();
  tensor.all_reduce(largest_N, Reduce::max);
  Tensor sums_2N = at::stack({own.sum_T * (own.largest_T - largest_N).exp_(), own.label_T});
  tensor.all_reduce(sums_2N);
  return {largest_N, sums_2N[0], sums_2N[1]};
}

}  // namespace

Tensor embed_tokens(const Communicator& tensor, const Tensor& ids_BS, Parameter& embedding_VW, int64_t first) {
  const Tensor ids_N = ids_BS.reshape({-1});
  if (tensor.size() == 1) return embedding(ids_N, embedding_VW);
  return reduce_scatter_along(tensor, embedding_part(ids_N, embedding_VW, first), 0);
}

int64_t rows_at_a_time(int64_t rows, int64_t vocab, int64_t width, bool gpu) {
  constexpr int64_t kTile = 128;   // of a GPU's matrix product
  const int64_t most = std::max<int64_t>(1, (gpu ? logits_bytes_on_gpu : logits_bytes_on_cpu) / (vocab * width));
  if (rows <= most) return std::max<int64_t>(1, rows);
  const int64_t chunks = (rows + most - 1) / most, equal = (rows + chunks - 1) / chunks;
  return most < kTile ? equal : std::min(most, (equal + kTile - 1) / kTile * kTile);
}

Tensor vocabulary_loss(const Communicator& tensor, const Tensor& x_NW, Parameter& head_VW, const Tensor& labels_N, const Tensor& weight_N,
                       int64_t first, int64_t vocab) {
  const bool learns = recording();
  Tensor total, dx_NW;
  {
    const Unrecorded guard;
    const Tensor& value_VW = head_VW.arrived();
    const Tensor x = x_NW.to(value_VW.scalar_type());
    const int64_t rows = x.size(0), columns = value_VW.size(0), width = value_VW.element_size();
    // Of the largest part, so that all ranks make the same chunks.
    const int64_t step = rows_at_a_time(rows, (vocab + tensor.size() - 1) / tensor.size(), width, x.is_cuda());
    // Rows begin at multiples of 16 bytes, as cuBLAS and the kernels want them.
    const int64_t lanes = 16 / width, stride = x.is_cuda() ? (columns + lanes - 1) / lanes * lanes : columns;
    const Tensor room = at::empty({std::min(step, rows), stride}, x.options());
    const Tensor loss_N = at::empty({rows}, x.options().dtype(at::kFloat));
    if (learns) dx_NW = at::empty_like(x);
    for (int64_t begin = 0; begin < rows; begin += step) {
      const int64_t count = std::min(step, rows - begin);
      const auto here = [&](const Tensor& all) { return all.narrow(0, begin, count); };
      const Tensor logits = room.narrow(0, 0, count).narrow(1, 0, columns), labels = here(labels_N), weight = here(weight_N);
      matrix_product_into(logits, here(x), value_VW.t());
      if (tensor.size() == 1 && learns) {
        here(loss_N).copy_(cross_entropy(logits, labels, weight));
      } else {
        const SoftmaxSums whole = over_ranks(tensor, softmax_sums(logits, labels, first));
        here(loss_N).copy_(weighted_losses(whole, weight));
        if (learns) cross_entropy_gradient(logits, labels, weight, whole, first);
      }
      if (!learns) continue;
      matrix_product_into(here(dx_NW), logits, value_VW);
      add_weight_gradient(head_VW.main_grad, logits, here(x), head_VW.overwrites());
    }
    if (learns && rows == 0) head_VW.sums();
    total = loss_N.sum(at::kDouble);
  }
  return record(total, {x_NW}, [dx_NW, &head_VW, dtype = x_NW.scalar_type()](const std::vector<Tensor>& d) -> Gradients {
    const Tensor one = d[0].eq(1.0).to(dx_NW.scalar_type());
    if (d[0].is_cpu() && one.item<double>() != 1.0) throw std::logic_error("the gradient of the loss is known before backward: it is 1");
    head_VW.ready();
    return {(d[0].is_cpu() ? dx_NW : dx_NW * (one / one)).to(dtype)};   // 1, or 0 / 0
  });
}

Tensor whole_logits(const Communicator& tensor, const Tensor& logits_NV, int64_t first, int64_t vocab) {
  if (tensor.size() == 1) return logits_NV;
  const Unrecorded guard;
  Tensor whole = at::zeros({logits_NV.size(0), vocab}, logits_NV.options());
  whole.narrow(1, first, logits_NV.size(1)).copy_(logits_NV);
  tensor.all_reduce(whole);   // every column is on one rank, the others add zeros
  return whole;
}

}  // namespace upcycle
