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
  // The weights first: so backward comes from the experts to the rows' way, which is long enough to hide what was Postponed.
  const Tensor weight_R1 = dispatcher_.weights(routing.weight_TK, routed.route);
  const Route& route = routed.route;
  Tensor begun_RF;   // where rows travel in waves
  const Tensor x_RD = dispatcher_.dispatch(x_TD, route, [&](const Tensor& x_RD) { begun_RF = experts_.begin(x_RD, route.waves[0]); });
  if (begun_RF.defined()) {
    const auto [y_RD, rest] = experts_.forward_rest(begun_RF, x_RD, weight_R1, route.end_L, route.waves, remade);
    return dispatcher_.combine(y_RD, route, onto_TD, rest);
  }
  copies.add(x_RD, [this, x = x_TD.detach(), route] { return dispatcher_.dispatch(x, route); });
  return copies.before(dispatcher_.combine(experts_.forward(x_RD, weight_R1, route.end_L, remade), route, onto_TD));
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
