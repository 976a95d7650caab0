#include "ops/cross_entropy.hpp"

#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>

#include "base/autograd.hpp"

namespace upcycle {

Tensor cross_entropy(const Tensor& logits_TV, const Tensor& labels_T) {
  const Tensor label_T1 = labels_T.unsqueeze(1);
  Tensor loss, log_sum_T1;
  {
    const Unrecorded guard;
    const Tensor logits32 = logits_TV.to(at::kFloat);
    log_sum_T1 = at::logsumexp(logits32, {1}, true);
    loss = (log_sum_T1 - logits32.gather(1, label_T1)).squeeze(1);
  }
  auto backward = [logits = logits_TV.detach(), label_T1, log_sum_T1](const std::vector<Tensor>& d) -> Gradients {
    Tensor gradient = (logits.to(at::kFloat) - log_sum_T1).exp_();  // softmax
    gradient.scatter_add_(1, label_T1, at::ones_like(log_sum_T1).neg_());
    return {gradient.mul_(d[0].unsqueeze(1)).to(logits.scalar_type())};
  };
  return record(loss, {logits_TV}, backward);
}

}  // namespace upcycle
