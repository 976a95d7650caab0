#pragma once
#include "moe/dispatcher.hpp"
#include "moe/experts.hpp"
#include "moe/router.hpp"

namespace upcycle {

/// A mixture-of-experts feed-forward: each token's K experts, weighed and summed.
class MoeLayer {
 public:
  MoeLayer(Router router, Dispatcher dispatcher, Experts experts)
      : router_(std::move(router)), dispatcher_(std::move(dispatcher)), experts_(std::move(experts)) {}

  /// **Collective** over the expert group. `x` [T, D] -> [T, D].
  Tensor forward(const Tensor& x_TD, const RouterContext& context);
  Router& router() noexcept { return router_; }

 private:
  Router router_;
  Dispatcher dispatcher_;
  Experts experts_;
};

}  // namespace upcycle
