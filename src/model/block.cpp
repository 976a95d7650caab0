#include "model/block.hpp"

#include "ops/linear.hpp"
#include "ops/rms_norm.hpp"
#include "ops/swiglu.hpp"
#include "parallel/regions.hpp"

namespace upcycle {
namespace {

std::string prefix_of(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

MoeLayer make_moe(Weights& weights, const Mesh& mesh, int64_t layer, const std::string& prefix) {
  const Architecture& architecture = weights.architecture();
  Parameter& router = weights.add({prefix + "gate.weight"});
  Parameter& gate_up = weights.add({prefix + "experts.gate_proj.weight", prefix + "experts.up_proj.weight"}, 1);
  Parameter& down = weights.add({prefix + "experts.down_proj.weight"});
  return {Router(router, mesh.along(Axis::sequence), {architecture.top_k, architecture.renormalise, layer}),
          Dispatcher(mesh.along(Axis::expert), architecture.experts), Experts(gate_up, down)};
}

}  // namespace

FeedForward::FeedForward(Weights& weights, const Mesh& mesh, const std::string& prefix)
    : tensor_(mesh.along(Axis::tensor)),
      gate_up_(weights.add({prefix + "gate_proj.weight", prefix + "up_proj.weight"})),
      down_(weights.add({prefix + "down_proj.weight"})) {}

Tensor FeedForward::forward(const Tensor& x_TW) {
  const Tensor gate_up = linear(gather_along(tensor_, x_TW, 0), gate_up_);
  return reduce_scatter_along(tensor_, linear(swiglu(gate_up), down_), 0);
}

Block::Block(Weights& weights, const Mesh& mesh, int64_t layer)
    : layer_(layer),
      eps_(weights.architecture().rms_eps),
      attention_norm_(weights.add({prefix_of(layer) + "input_layernorm.weight"})),
      attention_(weights, mesh, prefix_of(layer) + "self_attn."),
      feed_forward_norm_(weights.add({prefix_of(layer) + "post_attention_layernorm.weight"})) {
  const std::string prefix = prefix_of(layer) + "mlp.";
  if (weights.architecture().is_moe_layer(layer)) {
    moe_.emplace(make_moe(weights, mesh, layer, prefix));
  } else {
    dense_.emplace(weights, mesh, prefix);
  }
}

Tensor Block::forward(const Tensor& x_TW, const Positions& positions, const RouterContext& context) {
  const Tensor attended = attend(x_TW, positions);
  return attended + feed_forward(feed_forward_input(attended), context);
}

Tensor Block::attend(const Tensor& x_TW, const Positions& positions) {
  return x_TW + attention_.forward(rms_norm(x_TW, attention_norm_, eps_), positions);
}

Tensor Block::feed_forward_input(const Tensor& x_TW) { return rms_norm(x_TW, feed_forward_norm_, eps_); }

Tensor Block::feed_forward(const Tensor& h_TW, const RouterContext& context) {
  return dense_ ? dense_->forward(h_TW) : moe_->forward(h_TW, context);
}

}  // namespace upcycle
