#include "model/vocabulary.hpp"

#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"
#include "ops/cross_entropy.hpp"
#include "ops/embedding.hpp"
#include "parallel/regions.hpp"

namespace upcycle {

Tensor embed_tokens(const Communicator& tensor, const Tensor& ids_BS, Parameter& embedding_VW, int64_t first) {
  const Tensor ids_N = ids_BS.reshape({-1});
  if (tensor.size() == 1) return embedding(ids_N, embedding_VW);
  return reduce_scatter_along(tensor, embedding_part(ids_N, embedding_VW, first), 0);
}

Tensor vocabulary_cross_entropy(const Communicator& tensor, const Tensor& logits_NV, const Tensor& labels_N, int64_t first) {
  if (tensor.size() == 1) return cross_entropy(logits_NV, labels_N);
  Tensor loss, log_sum_N1, label_N1, mine_N1;
  {
    const Unrecorded guard;
    const Tensor logits32 = logits_NV.to(at::kFloat);
    const int64_t rows = logits_NV.size(1);
    label_N1 = labels_N.unsqueeze(1) - first;
    mine_N1 = label_N1.ge(0).logical_and(label_N1.lt(rows)).to(at::kFloat);
    label_N1.clamp_(0, rows - 1);
    Tensor largest_N1 = logits32.amax(1, /*keepdim=*/true);
    tensor.all_reduce(largest_N1, Reduce::max);
    Tensor sums_2N1 = at::stack({(logits32 - largest_N1).exp_().sum(1, /*keepdim=*/true), logits32.gather(1, label_N1) * mine_N1});
    tensor.all_reduce(sums_2N1);
    log_sum_N1 = sums_2N1[0].log() + largest_N1;
    loss = (log_sum_N1 - sums_2N1[1]).squeeze(1);
  }
  auto backward = [logits = logits_NV.detach(), log_sum_N1, label_N1, mine_N1](const std::vector<Tensor>& d) -> Gradients {
    Tensor gradient = (logits.to(at::kFloat) - log_sum_N1).exp_();  // softmax
    gradient.scatter_add_(1, label_N1, mine_N1.neg());
    return {gradient.mul_(d[0].unsqueeze(1)).to(logits.scalar_type())};
  };
  return record(loss, {logits_NV}, backward);
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
