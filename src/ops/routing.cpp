#include "ops/routing.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "device/stream.hpp"
#include "ops/cuda/routing.hpp"

namespace upcycle {
namespace {

template <typename T>
const T* data(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}
template <typename T>
T* data_to_write(const Tensor& x) {
  return x.defined() ? x.mutable_data_ptr<T>() : nullptr;
}
Tensor contiguous(const Tensor& x) { return x.defined() ? x.contiguous() : x; }

}  // namespace

bool routes_in_one_pass(const Tensor& logits_TE) {
  return logits_TE.is_cuda() && logits_TE.scalar_type() == at::kFloat && logits_TE.size(1) <= cuda::kMostExperts;
}

RoutingPass routing_pass(const Tensor& logits, const RoutingRules& rules) {
  const Tensor logits_TE = logits.contiguous(), given_TK = contiguous(rules.expert_TK), bias_E = contiguous(rules.bias_E);
  const Tensor part_T = contiguous(rules.part_T);
  const int64_t tokens = logits_TE.size(0), experts = logits_TE.size(1), top_k = given_TK.defined() ? given_TK.size(1) : rules.top_k;
  const int64_t blocks = cuda::routing_blocks(tokens, static_cast<int>(experts));
  const at::TensorOptions fp32 = logits_TE.options(), integer = fp32.dtype(at::kLong);
  RoutingPass pass;
  pass.expert_TK = given_TK.defined() ? given_TK : at::empty({tokens, top_k}, integer);
  pass.weight_TK = at::empty({tokens, top_k}, fp32);
  pass.log_sum_T = at::empty({tokens}, fp32);
  // One buffer of zeros for all that is added to.
  const int64_t of_parts = rules.parts * experts, counts_of_parts = part_T.defined() ? of_parts : 0;
  const Tensor sums = at::zeros({experts + of_parts + counts_of_parts}, integer);
  pass.count_E = sums.narrow(0, 0, experts);
  if (rules.parts > 0) {
    pass.probability_PE = sums.narrow(0, experts, of_parts).view({rules.parts, experts});
    pass.count_PE = part_T.defined() ? sums.narrow(0, experts + of_parts, of_parts).view({rules.parts, experts})
                                     : pass.count_E.view({1, experts});
    pass.measure_N2 = at::empty({blocks, 2}, fp32);
  }
  cuda::routing_forward({.logits_TE = data<float>(logits_TE),
                         .bias_E = data<float>(bias_E),
                         .given_TK = data<int64_t>(given_TK),
                         .expert_TK = given_TK.defined() ? nullptr : data_to_write<int64_t>(pass.expert_TK),
                         .weight_TK = data_to_write<float>(pass.weight_TK),
                         .log_sum_T = data_to_write<float>(pass.log_sum_T),
                         .count_E = data_to_write<int64_t>(pass.count_E),
                         .part_T = rules.parts > 0 ? data<int64_t>(part_T) : nullptr,
                         .count_PE = data_to_write<int64_t>(pass.count_PE),
                         .probability_PE = data_to_write<int64_t>(pass.probability_PE),
                         .measure_N2 = data_to_write<float>(pass.measure_N2),
                         .tokens = tokens,
                         .experts = static_cast<int>(experts),
                         .top_k = static_cast<int>(top_k),
                         .renormalise = rules.renormalise},
                        device::current_stream(logits_TE.device()));
  return pass;
}

Tensor routing_shares(const RoutingPass& pass, const Tensor& counts, double choices, double tokens, Tensor& seen_E, Tensor& measures_3) {
  const Tensor count_PE = contiguous(counts);
  const at::TensorOptions integer = pass.count_E.options();
  const bool first = !seen_E.defined();
  if (first) {
    seen_E = at::empty(pass.count_E.sizes(), integer);
    measures_3 = at::empty({3}, integer.dtype(at::kDouble));
  }
  const Tensor share_PE = at::empty(pass.probability_PE.sizes(), integer.dtype(at::kFloat));
  cuda::routing_measures({.count_PE = data<int64_t>(count_PE),
                          .choices = choices,
                          .probability_PE = data<int64_t>(pass.probability_PE),
                          .measure_N2 = data<float>(pass.measure_N2),
                          .blocks = pass.measure_N2.size(0),
                          .tokens = tokens,
                          .count_E = data<int64_t>(pass.count_E),
                          .share_PE = data_to_write<float>(share_PE),
                          .seen_E = data_to_write<int64_t>(seen_E),
                          .measures_3 = data_to_write<double>(measures_3),
                          .first = first,
                          .parts = share_PE.size(0),
                          .experts = static_cast<int>(share_PE.size(1))},
                         device::current_stream(share_PE.device()));
  return share_PE;
}

Tensor routing_gradient(const Tensor& logits, const Tensor& log_sum_T, const Tensor& expert_TK, const Tensor& weight_TK,
                        const Tensor& d_weight, bool renormalise, const RoutingLosses& losses) {
  const Tensor logits_TE = logits.contiguous(), d_weight_TK = d_weight.contiguous(), part_T = contiguous(losses.part_T);
  const Tensor d_logits_TE = at::empty_like(logits_TE);
  cuda::routing_backward({.logits_TE = data<float>(logits_TE),
                          .log_sum_T = data<float>(log_sum_T),
                          .expert_TK = data<int64_t>(expert_TK),
                          .weight_TK = data<float>(weight_TK),
                          .d_weight_TK = data<float>(d_weight_TK),
                          .share_PE = data<float>(losses.share_PE),
                          .part_T = data<int64_t>(part_T),
                          .aux = static_cast<float>(losses.aux),
                          .z = static_cast<float>(losses.z),
                          .d_logits_TE = data_to_write<float>(d_logits_TE),
                          .tokens = logits_TE.size(0),
                          .experts = static_cast<int>(logits_TE.size(1)),
                          .top_k = static_cast<int>(d_weight_TK.size(1)),
                          .renormalise = renormalise},
                         device::current_stream(logits_TE.device()));
  return d_logits_TE;
}

}  // namespace upcycle
