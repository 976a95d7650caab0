// dispatcher, experts and the layer, on one rank; ranks.dispatcher has the others
#include "moe/moe_layer.hpp"

#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include "support/numbers.hpp"

// Shapes: T tokens, K choices of each, E experts, F width of one expert, D width of the model.
namespace upcycle {
namespace {

TEST(Dispatcher, CombineOfDispatchIsX) {
  const Communicator alone;
  for (const int64_t tokens : {0, 1, 37}) {
    Parameter weight = trained(normal({8, 6}, 1));
    Router router(weight, alone, {.top_k = 3});
    const Dispatcher dispatcher(alone, alone, {.experts = 8, .top_k = 3});
    const Tensor x = normal({tokens, 6}, 2).requires_grad_(), dy = normal({tokens, 6}, 3);
    const Routing routing = router.forward(x.detach(), {});
    const Route route = dispatcher.plan(routing);
    const Tensor x_RD = dispatcher.dispatch(x, route);
    EXPECT_EQ(x_RD.sizes(), (Shape{3 * tokens, 6}));
    EXPECT_TRUE(route.end_L.equal(routing.count_E.cumsum(0).to(at::kInt)));
    const Tensor y = dispatcher.combine(x_RD * dispatcher.weights(routing.weight_TK, route), route);
    EXPECT_LE(distance(y, x), 1e-6);
    run_backward(y, dy);
    EXPECT_LE(distance(x.grad(), dy), 1e-6);
  }
}

TEST(Dispatcher, RowsAreWithTheirExperts) {
  const Communicator alone;
  Parameter weight = trained(normal({8, 6}, 1));
  Router router(weight, alone, {.top_k = 2});
  const Tensor x = normal({29, 6}, 2);
  const Routing routing = router.forward(x, {});
  const Dispatcher dispatcher(alone, alone, {.experts = 8, .top_k = 2});
  const Route route = dispatcher.plan(routing);
  const Tensor x_RD = dispatcher.dispatch(x, route);
  for (int64_t e = 0, row = 0; e < 8; ++e) {
    for (int64_t t = 0; t < 29; ++t) {
      if (!routing.expert_TK[t].eq(e).any().item<bool>()) continue;
      EXPECT_TRUE(x_RD[row++].equal(x[t])) << "expert " << e << ", token " << t;
    }
    EXPECT_EQ(route.end_L[e].item<int32_t>(), row);
  }
}

struct Weights64 {
  Tensor router, gate_up, down;
};

/// Every expert for every token, then the chosen ones: no sorting, no rows. fp64.
Tensor layer64(const Tensor& x, const Weights64& w, const Tensor& expert_TK, bool renormalise) {
  const Tensor probability = at::softmax(at::matmul(x, w.router.t()), -1);
  const Tensor mask = at::zeros_like(probability).scatter_(1, expert_TK, 1.0);
  Tensor weight = probability * mask;
  if (renormalise) weight = weight / weight.sum(1, true);
  Tensor y = at::zeros_like(x);
  const int64_t width = w.gate_up.size(1) / 2;
  for (int64_t e = 0; e < w.router.size(0); ++e) {
    const Tensor both = at::matmul(x, w.gate_up[e].t()), gate = both.narrow(1, 0, width);
    y = y + at::matmul(gate * at::sigmoid(gate) * both.narrow(1, width, width), w.down[e].t()) * weight.narrow(1, e, 1);
  }
  return y;
}

TEST(MoeLayer, IsTheSumOfItsExperts) {
  const Communicator alone;
  for (const bool renormalise : {true, false}) {
    for (const auto& [tokens, experts, top_k] : {std::tuple{31, 6, 2}, {5, 16, 4}, {1, 4, 1}, {9, 3, 3}}) {  // experts without tokens, too
      SCOPED_TRACE(testing::Message() << tokens << " tokens, top " << top_k << " of " << experts);
      const int64_t width = 7, hidden = 10;
      Parameter router = trained(normal({experts, hidden}, 1)), gate_up = trained(normal({experts, 2 * width, hidden}, 2));
      Parameter down = trained(normal({experts, hidden, width}, 3));
      MoeLayer layer(Router(router, alone, {.top_k = top_k, .renormalise = renormalise}), Dispatcher(alone, alone, {experts, top_k}),
                     Experts(gate_up, down), alone);
      const Tensor x = normal({tokens, hidden}, 4).requires_grad_(), dy = normal({tokens, hidden}, 5);
      const Tensor y = layer.forward(x, {});
      run_backward(y, dy);

      const auto leaf = [](const Tensor& of) { return of.detach().to(at::kDouble).requires_grad_(); };
      const Weights64 w{leaf(router.value), leaf(gate_up.value), leaf(down.value)};
      const Tensor x64 = leaf(x), y64 = layer64(x64, w, choose_experts(layer.router().logits(x), top_k), renormalise);
      run_backward(y64, dy.to(at::kDouble));
      EXPECT_LE(distance(y, y64), 1e-6);
      EXPECT_LE(distance(x.grad(), x64.grad()), 2e-6);
      EXPECT_LE(distance(gate_up.main_grad, w.gate_up.grad()), 2e-6);
      EXPECT_LE(distance(down.main_grad, w.down.grad()), 2e-6);
      if (top_k == 1 && renormalise) {
        EXPECT_LE(router.main_grad.norm().item<double>(), 1e-5);  // its one weight is always 1
      } else {
        EXPECT_LE(distance(router.main_grad, w.router.grad()), 1e-5);
      }
    }
  }
}

}  // namespace
}  // namespace upcycle
