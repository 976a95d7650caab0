// N choices of a micro-batch, those of all ranks that share it
#include "moe/capacity.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>

#include <cmath>

#include "base/autograd.hpp"
#include "ops/permute.hpp"

namespace upcycle {

int64_t capacity_of(double factor, int64_t tokens, int64_t top_k, int64_t experts) {
  return static_cast<int64_t>(std::ceil(factor * static_cast<double>(tokens * top_k) / static_cast<double>(experts)));
}

Routing limited(const Routing& routing, const Tensor& token_T, const Communicator& sharing, const CapacitySettings& settings) {
  if (settings.factor == 0) return routing;
  const Unrecorded guard;
  const int64_t tokens = routing.expert_TK.size(0), top_k = routing.expert_TK.size(1), experts = routing.count_E.size(0);
  const auto of_all = [&](const Tensor& x) { return sharing.all_gather(x.contiguous(), 0); };
  const Tensor expert_N = of_all(routing.expert_TK).reshape({-1});
  const Tensor token_N = of_all(token_T).unsqueeze(1).expand({-1, top_k}).reshape({-1});

  // Stable sorts, the last wish first: by expert, in it by weight, of equal weights by token.
  Tensor order_N = at::argsort(token_N, /*stable=*/true);
  const auto then_by = [&](const Tensor& key_N, bool descending) {
    order_N = order_N.index_select(0, at::argsort(key_N.index_select(0, order_N), /*stable=*/true, 0, descending));
  };
  if (settings.policy == DropPolicy::weight) then_by(of_all(routing.weight_TK.detach()).reshape({-1}), true);
  then_by(expert_N, false);

  Routing kept = routing;
  kept.capacity = capacity_of(settings.factor, tokens * sharing.size(), top_k, experts);
  const Tensor count_E = count_choices(expert_N, experts), begin_E = count_E.cumsum(0) - count_E;
  const Tensor place_N = at::arange(order_N.size(0), order_N.options()) - begin_E.index_select(0, expert_N.index_select(0, order_N));
  const Tensor fits = place_N.lt(kept.capacity);
  const Tensor keep_N = at::empty_like(fits).scatter_(0, order_N, fits);
  const Tensor keep_TK = keep_N.narrow(0, sharing.rank() * tokens * top_k, tokens * top_k).view({tokens, top_k});
  kept.expert_TK = at::where(keep_TK, routing.expert_TK, experts);
  kept.count_E = count_choices(kept.expert_TK, experts);
  return kept;
}

}  // namespace upcycle
