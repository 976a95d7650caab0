#include "moe/router.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"
#include "ops/linear.hpp"

namespace upcycle {
namespace {

// Identity on `weight_TK` whose backward sends `coefficient` into `loss`, whatever the gradient of the weights is
// (Megatron-Core's MoEAuxLossAutoScaler): a stage hands on activations only, and still every loss has its gradient.
Tensor attach_loss(const Tensor& weight_TK, const Tensor& loss, double coefficient) {
  return record(weight_TK, {weight_TK, loss}, [coefficient, like = loss.detach()](const std::vector<Tensor>& d) -> Gradients {
    return {d[0], at::full({}, coefficient, like.options())};
  });
}

}  // namespace

Tensor choose_experts(const Tensor& logits_TE, int64_t top_k) {
  const Unrecorded guard;
  const int64_t experts = logits_TE.size(1);
  // A float's bits, read as an integer, order like the float once the negative ones are turned round; + 0.0 makes -0 equal 0.
  const Tensor bits = (logits_TE + 0.0).view(at::kInt).to(at::kLong);
  const Tensor ordered = at::where(bits.ge(0), bits, bits.bitwise_xor(0x7fffffff));
  const Tensor index_from_end = at::arange(experts - 1, -1, -1, ordered.options());
  const Tensor key = ordered.mul(int64_t{1} << 32).add_(index_from_end);
  return std::get<1>(at::topk(key, top_k, 1, /*largest=*/true, /*sorted=*/true));
}

Router::Router(Parameter& weight_ED, RouterSettings settings) : weight_ED_(weight_ED), settings_(settings) {}

void Router::count(const Tensor& count_E, const Tensor& aux, const Tensor& z) {
  const Tensor losses_2 = at::stack({aux.detach(), z.detach()}).to(at::kDouble);
  if (!statistics_.count_E.defined()) {
    statistics_ = {count_E.clone(), losses_2};
  } else {
    statistics_.count_E.add_(count_E);
    statistics_.losses_2.add_(losses_2);
  }
}

Tensor Router::logits(const Tensor& x_TD) { return linear(x_TD.to(at::kFloat), weight_ED_); }

Routing Router::forward(const Tensor& x_TD, const BalanceLoss& balance) {
  const Tensor logits_TE = logits(x_TD);
  const int64_t tokens = logits_TE.size(0), experts = logits_TE.size(1);
  const Tensor expert_TK = choose_experts(logits_TE, settings_.top_k);
  const Tensor probability_TE = at::softmax(logits_TE, -1);
  Tensor weight_TK = settings_.renormalise ? at::softmax(logits_TE.gather(1, expert_TK), -1)
                                           : probability_TE.gather(1, expert_TK);
  const Tensor choice_R = expert_TK.reshape({-1});
  Tensor count_E = at::zeros({experts}, choice_R.options());   // by hand, for bincount makes the host wait for a GPU
  count_E.scatter_add_(0, choice_R, at::ones_like(choice_R));
  if (recording()) {
    const Tensor share_E = count_E.to(at::kFloat) / static_cast<double>(tokens * settings_.top_k);
    const Tensor aux = (share_E * probability_TE.mean(0)).sum() * static_cast<double>(experts);
    const Tensor z = at::logsumexp(logits_TE, {1}).square().mean();
    if (balance.aux != 0) weight_TK = attach_loss(weight_TK, aux, balance.aux);
    if (balance.z != 0) weight_TK = attach_loss(weight_TK, z, balance.z);
    count(count_E, aux, z);
  }
  return {expert_TK, weight_TK, count_E};
}

}  // namespace upcycle
