#include "moe/balance_loss.hpp"

#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/where.h>

#include "base/autograd.hpp"
#include "ops/permute.hpp"

namespace upcycle {
namespace {

// What each row's probabilities are weighed with: [E], the same for all, or [T, E]. At balance 1/E everywhere.
Tensor shares(const Communicator& sharing, const BalanceLoss& loss, const Tensor& expert_TK, const Tensor& count_E, const Tensor& last_E) {
  const Unrecorded guard;
  const int64_t experts = count_E.size(0), rows = expert_TK.size(0), top_k = expert_TK.size(1);
  if (loss.scope == BalanceScope::global) {
    if (!last_E.defined()) return at::full({experts}, 1.0 / static_cast<double>(experts), count_E.options().dtype(at::kFloat));
    return (last_E.to(at::kDouble) / last_E.sum()).to(at::kFloat);
  }
  const double choices = static_cast<double>(rows * sharing.size() * top_k);   // of the micro-batch
  if (loss.scope == BalanceScope::batch) {
    Tensor count = count_E.clone();
    sharing.all_reduce(count);
    return count.to(at::kFloat) / choices;
  }
  const Tensor slot_TK = expert_TK + loss.sequence_T.unsqueeze(1) * experts;
  Tensor count_BE = count_choices(slot_TK, loss.sequences * experts).view({loss.sequences, experts});
  sharing.all_reduce(count_BE);
  const Tensor share_BE = count_BE.to(at::kFloat) / (choices / static_cast<double>(loss.sequences));
  return share_BE.index_select(0, loss.sequence_T);
}

}  // namespace

Measures measure(const Communicator& sharing, const BalanceLoss& loss, const Tensor& logits_TE, const Tensor& probability_TE,
                 const Tensor& expert_TK, const Tensor& count_E, const Tensor& last_E) {
  const double tokens = static_cast<double>(logits_TE.size(0) * sharing.size()), experts = static_cast<double>(logits_TE.size(1));
  const Tensor share = shares(sharing, loss, expert_TK, count_E, last_E);
  Measures measures;
  measures.aux = (share * (share.dim() == 1 ? probability_TE.sum(0) : probability_TE)).sum() * (experts / tokens);
  const Tensor log_sum_T = at::logsumexp(logits_TE, {1});
  measures.z = log_sum_T.square().sum() / tokens;
  const Unrecorded guard;
  measures.entropy = (log_sum_T - (probability_TE * logits_TE).sum(1)).sum() / tokens;   // - sum p log p, log p = logit - log sum
  return measures;
}

RoutingLosses add_measures(const Communicator& sharing, const BalanceLoss& loss, const RoutingPass& pass, const Tensor& last_E,
                           Tensor& seen_E, Tensor& measures_3) {
  const Unrecorded guard;
  const int64_t experts = pass.count_E.size(0), rows = pass.weight_TK.size(0) * sharing.size(), top_k = pass.weight_TK.size(1);
  const bool by_sequence = loss.scope == BalanceScope::sequence;
  const double tokens = static_cast<double>(rows);
  Tensor count_PE = last_E;
  double choices = 0.0;
  if (loss.scope != BalanceScope::global) {
    const bool shared = !by_sequence && sharing.size() > 1;   // with count_E, which stays this rank's
    count_PE = shared ? pass.count_PE.clone() : pass.count_PE;
    sharing.all_reduce(count_PE);
    choices = static_cast<double>(rows * top_k) / (by_sequence ? static_cast<double>(loss.sequences) : 1.0);
  }
  const Tensor share_PE = routing_shares(pass, count_PE, choices, tokens, seen_E, measures_3);
  RoutingLosses losses;
  losses.z = loss.z * 2 / tokens;
  if (loss.aux == 0) return losses;
  losses.share_PE = share_PE;
  losses.aux = loss.aux * static_cast<double>(experts) / tokens;
  if (by_sequence) losses.part_T = loss.sequence_T;
  return losses;
}

Tensor moved_bias(const Tensor& bias_E, const Tensor& count_E, double rate, const Tensor& applied) {
  const Unrecorded guard;
  const Tensor direction_E = (count_E.sum() - count_E * count_E.size(0)).sign();   // in whole numbers: no rounding decides
  return at::where(applied, bias_E + direction_E.to(at::kFloat) * rate, bias_E);
}

}  // namespace upcycle
