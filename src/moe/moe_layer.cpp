#include "moe/moe_layer.hpp"

namespace upcycle {

Tensor MoeLayer::forward(const Tensor& x_TD, const RouterContext& context) {
  const Routing routing = router_.forward(x_TD, context);
  const Arrived arrived = dispatcher_.dispatch(x_TD, routing);
  const Tensor y_RD = experts_.forward(arrived.x_RD, arrived.end_L);
  return dispatcher_.combine(y_RD, arrived);
}

}  // namespace upcycle
