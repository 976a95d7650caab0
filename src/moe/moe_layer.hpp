#pragma once
#include "base/autograd.hpp"
#include "moe/capacity.hpp"
#include "moe/dispatcher.hpp"
#include "moe/experts.hpp"
#include "moe/router.hpp"

namespace upcycle {

/// What a pass over some tokens decided, for those that compute it again: they must go the same ways, or rank would wait for rank.
struct Routed {
  Tensor expert_TK;   ///< the router's choice; undefined: nothing is decided yet
  Tensor dropped;     ///< int64 scalar, choices that found their expert full
  Route route;
};

/// A mixture-of-experts feed-forward: each token's K experts, weighed and summed.
class MoeLayer {
 public:
  /// `sharing`: the ranks that share a micro-batch.
  MoeLayer(Router router, Dispatcher dispatcher, Experts experts, const Communicator& sharing, CapacitySettings capacity = {})
      : router_(std::move(router)),
        dispatcher_(std::move(dispatcher)),
        experts_(std::move(experts)),
        sharing_(sharing),
        capacity_(capacity) {}

  /// **Collective** over the expert, expert_tensor and sharing groups. `x` [T, D] -> [T, D]. Experts have a capacity where the context
  /// knows the tokens' numbers, which is in training. Decides the ways, or goes those of `routed`. Adds what it can make again to
  /// `remade`, from x on. `onto_TD`, unless it is undefined: what the experts' sum is added onto.
  Tensor forward(const Tensor& x_TD, const RouterContext& context, Routed& routed, Remade& remade, const Tensor& onto_TD = {});
  /// The same, deciding anew and keeping everything.
  Tensor forward(const Tensor& x_TD, const RouterContext& context);
  Router& router() noexcept { return router_; }

 private:
  void decide(const Routing& routing, const Tensor& token_T, Routed& routed) const;

  Router router_;
  Dispatcher dispatcher_;
  Experts experts_;
  const Communicator& sharing_;
  CapacitySettings capacity_;
};

}  // namespace upcycle
