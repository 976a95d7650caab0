#include "moe/moe_layer.hpp"

namespace upcycle {

Tensor MoeLayer::forward(const Tensor& x_TD, const RouterContext& context, Routed& routed, Remade& remade, const Tensor& onto_TD) {
  RouterContext told = context;
  told.expert_TK = routed.expert_TK;
  const Routing routing = router_.forward(x_TD, told);
  if (!routed.expert_TK.defined()) decide(routing, context.token_T, routed);
  if (recording() && routed.dropped.defined()) router_.statistics().dropped.add_(routed.dropped);
  // The experts' rows are K copies of the tokens'. Unless they had to travel, copying them again costs backward so little that they are
  // never kept, whatever train.recompute says.
  Remade copies(dispatcher_.at_home());
  const auto [x_RD, weight_R1] = dispatcher_.dispatch(x_TD, routing.weight_TK, routed.route);
  copies.add(x_RD, [this, x = x_TD.detach(), route = routed.route] { return dispatcher_.dispatch(x, route); });
  return copies.before(dispatcher_.combine(experts_.forward(x_RD, weight_R1, routed.route.end_L, remade), routed.route, onto_TD));
}

Tensor MoeLayer::forward(const Tensor& x_TD, const RouterContext& context) {
  Routed routed;
  Remade nothing(false);
  return forward(x_TD, context, routed, nothing);
}

void MoeLayer::decide(const Routing& routing, const Tensor& token_T, Routed& routed) const {
  const Unrecorded guard;
  routed.expert_TK = routing.expert_TK;
  if (capacity_.factor == 0 || !token_T.defined()) {
    routed.route = dispatcher_.plan(routing);
    return;
  }
  const Routing kept = limited(routing, token_T, sharing_, capacity_);
  routed.dropped = (routing.count_E - kept.count_E).sum();
  routed.route = dispatcher_.plan(kept);
}

}  // namespace upcycle
