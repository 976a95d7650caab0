#include "moe/router.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"
#include "base/rng.hpp"
#include "base/trace_range.hpp"
#include "ops/permute.hpp"
#include "ops/router_product.hpp"
#include "ops/routing.hpp"
#include "ops/uniform.hpp"

namespace upcycle {
namespace {

// Identity on `weight_TK` whose backward sends `coefficient` into `loss`, whatever the gradient of the weights is
// (Megatron-Core's MoEAuxLossAutoScaler): a stage hands on activations only, and still every loss has its gradient.
Tensor attach_loss(const Tensor& weight_TK, const Tensor& loss, double coefficient) {
  return record(weight_TK, {weight_TK, loss}, [coefficient, like = loss.detach()](const std::vector<Tensor>& d) -> Gradients {
    return {d[0], at::full({}, coefficient, like.options())};
  });
}

Tensor shaken(const Tensor& x_TD, const Jitter& jitter, const Tensor& token_T, int64_t layer) {
  if (jitter.size == 0) return x_TD;
  const Random random(jitter.seed, "model.layers." + std::to_string(layer) + ".mlp.gate/jitter");
  return x_TD.to(at::kFloat) * uniform(random, token_T, x_TD.size(1)).mul_(2 * jitter.size).add_(1 - jitter.size);
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

Router::Router(Parameter& weight_ED, const Communicator& sharing, RouterSettings settings)
    : weight_ED_(weight_ED), sharing_(&sharing), settings_(settings) {}

void Router::count(const Tensor& count_E, const Measures& measures) {
  const Tensor measures_3 = at::stack({measures.aux.detach(), measures.z.detach(), measures.entropy}).to(at::kDouble);
  if (!statistics_.count_E.defined()) {
    statistics_ = {count_E.clone(), measures_3, at::zeros({}, count_E.options())};
  } else {
    statistics_.count_E.add_(count_E);
    statistics_.measures_3.add_(measures_3);
  }
}

Tensor Router::logits(const Tensor& x_TD) { return router_product(x_TD, weight_ED_); }

Routing Router::forward(const Tensor& x_TD, const RouterContext& context) {
  const TraceRange range("router");
  return route(logits(shaken(x_TD, context.jitter, context.token_T, settings_.layer)), context);
}

Routing Router::route(const Tensor& logits_TE, const RouterContext& context) {
  if (!routes_in_one_pass(logits_TE)) return route_written_out(logits_TE, context);
  const bool records = recording(), by_sequence = context.balance.scope == BalanceScope::sequence;
  RoutingPass pass;
  RoutingLosses losses;
  {
    const Unrecorded guard;
    pass = routing_pass(logits_TE, {.top_k = settings_.top_k,
                                    .renormalise = settings_.renormalise,
                                    .bias_E = state_.bias_E,
                                    .expert_TK = context.expert_TK,
                                    .parts = !records ? 0 : by_sequence ? context.balance.sequences : 1,
                                    .part_T = records && by_sequence ? context.balance.sequence_T : Tensor()});
    if (records) {
      losses = add_measures(*sharing_, context.balance, pass, state_.count_E, statistics_.count_E, statistics_.measures_3);
      if (!statistics_.dropped.defined()) statistics_.dropped = at::zeros({}, pass.count_E.options());
    }
  }
  // The losses' gradients come whatever that of the weights is, as with attach_loss.
  auto backward = [logits_TE = logits_TE.detach(), log_sum_T = pass.log_sum_T, expert_TK = pass.expert_TK, weight_TK = pass.weight_TK,
                   renormalise = settings_.renormalise, losses](const std::vector<Tensor>& d) -> Gradients {
    return {routing_gradient(logits_TE, log_sum_T, expert_TK, weight_TK, d[0], renormalise, losses)};
  };
  return {pass.expert_TK, record(pass.weight_TK, {logits_TE}, std::move(backward)), pass.count_E};
}

Routing Router::route_written_out(const Tensor& logits_TE, const RouterContext& context) {
  const Tensor expert_TK = context.expert_TK.defined() ? context.expert_TK : choose_experts(biased(logits_TE), settings_.top_k);
  const Tensor probability_TE = at::softmax(logits_TE, -1);
  Tensor weight_TK = settings_.renormalise ? at::softmax(logits_TE.gather(1, expert_TK), -1)
                                           : probability_TE.gather(1, expert_TK);
  const Tensor count_E = count_choices(expert_TK, logits_TE.size(1));
  if (recording()) {
    const Measures measures = measure(*sharing_, context.balance, logits_TE, probability_TE, expert_TK, count_E, state_.count_E);
    if (context.balance.aux != 0) weight_TK = attach_loss(weight_TK, measures.aux, context.balance.aux);
    if (context.balance.z != 0) weight_TK = attach_loss(weight_TK, measures.z, context.balance.z);
    count(count_E, measures);
  }
  return {expert_TK, weight_TK, count_E};
}

// The bias goes to the logits, not to the probabilities: a step of it means the same for a token that is sure of its expert and for
// one that is not, and without a bias the choice is bit for bit that of the logits. (The paper's own scores are sigmoids.)
Tensor Router::biased(const Tensor& logits_TE) const {
  const Unrecorded guard;
  return state_.bias_E.defined() ? logits_TE + state_.bias_E : logits_TE;
}

}  // namespace upcycle
