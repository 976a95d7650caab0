// The mixture layer, forward and backward, beside the six grouped products in it, on the same rows of the same experts.
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/randn_like.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/autograd.hpp"
#include "bench.hpp"
#include "moe/moe_layer.hpp"
#include "ops/grouped_matmul.hpp"

namespace upcycle::bench {
namespace {

void one(Bench& bench, const Sizes& s) {
  const Communicator alone;
  Parameter router = bench.weight({s.experts, s.hidden}, at::kFloat);
  Parameter gate_up = bench.weight({s.experts, 2 * s.ffn, s.hidden}), down = bench.weight({s.experts, s.hidden, s.ffn});
  MoeLayer layer(Router(router, alone, {.top_k = s.top_k}), Dispatcher(alone, alone, {s.experts, s.top_k}), Experts(gate_up, down), alone);
  const Tensor x_TD = bench.leaf({s.tokens, s.hidden}), dy_TD = bench.draw({s.tokens, s.hidden});
  const auto forget = [&] {
    x_TD.mutable_grad() = Tensor();
    layer.router().reset_statistics();
  };
  constexpr int kLaunches = 120;   // of all that is timed together; generous
  const Bench::Time whole = bench.time({forget, [&] { GraphEnd(layer.forward(x_TD, {})).backward(dy_TD); }}, kLaunches);

  // Where the experts' rows end, as this layer routed this x in its last run.
  const Tensor count_E = layer.router().statistics().count_E;
  const Tensor end_E = count_E.cumsum(0).to(at::kInt);
  const Tensor x_RD = bench.leaf({s.rows(), s.hidden}), h_RF = bench.leaf({s.rows(), s.ffn});
  const Tensor d_gate_up = bench.draw({s.rows(), 2 * s.ffn}), d_down = bench.draw({s.rows(), s.hidden});
  const Bench::Time ours = bench.time({[&] { x_RD.mutable_grad() = h_RF.mutable_grad() = Tensor(); },
                                       [&] {
                                         GraphEnd(grouped_matmul(x_RD, gate_up, end_E)).backward(d_gate_up);
                                         GraphEnd(grouped_matmul(h_RF, down, end_E)).backward(d_down);
                                       }}, kLaunches);
  const auto aten = [&](const Tensor& x, const Tensor& weight, const Tensor& dy) {
    at::_grouped_mm(x, weight.transpose(1, 2), end_E);
    at::_grouped_mm(dy, weight, end_E);
    at::_grouped_mm(dy.t(), x, end_E);
  };
  const Bench::Time plain = bench.time({{}, [&] {
                                          const Unrecorded guard;
                                          aten(x_RD, gate_up.value, d_gate_up);
                                          aten(h_RF, down.value, d_down);
                                        }}, kLaunches);
  const double flops = 18.0 * static_cast<double>(s.rows() * s.hidden * s.ffn), products = std::min(ours.seconds, plain.seconds);
  const double fullest = (count_E.max().to(at::kDouble) / count_E.to(at::kDouble).mean()).item<double>();
  std::cout << nlohmann::ordered_json{{"shape", s.name}, {"experts", s.experts}, {"top_k", s.top_k}, {"tokens", s.tokens}, {"hidden", s.hidden}, {"ffn", s.ffn},
                                      {"layer_seconds", whole.seconds}, {"spread", whole.spread}, {"own_products_seconds", ours.seconds},
                                      {"aten_products_seconds", plain.seconds}, {"products_over_layer", products / whole.seconds},
                                      {"flops", flops}, {"bound_seconds", bench.bound({0, flops})}, {"fullest_over_mean", fullest}}.dump() << std::endl;
}

}  // namespace

void moe_layer(Bench& bench) {
  for (const Sizes& sizes : layer_shapes(bench.tiny)) one(bench, sizes);
}

}  // namespace upcycle::bench
