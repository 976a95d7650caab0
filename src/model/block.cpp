#include "model/block.hpp"

#include "base/trace_range.hpp"
#include "model/gathered_linear.hpp"
#include "ops/linear.hpp"
#include "ops/swiglu.hpp"
#include "parallel/regions.hpp"

namespace upcycle {
namespace {

std::string prefix_of(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

MoeLayer make_moe(Weights& weights, const Mesh& mesh, int64_t layer, const std::string& prefix, const ModelSettings& settings) {
  const Architecture& architecture = weights.architecture();
  Parameter& router = weights.add({prefix + "gate.weight"});
  Parameter& gate_up = weights.add({prefix + "experts.gate_proj.weight", prefix + "experts.up_proj.weight"}, 1);
  Parameter& down = weights.add({prefix + "experts.down_proj.weight"});
  const bool beside_transfers = mesh.world().size() > mesh.along(Axis::pipeline).size();   // stages exchange little
  return {Router(router, mesh.along(Axis::sequence), {architecture.top_k, architecture.renormalise, layer}),
          Dispatcher(mesh.along(Axis::expert), mesh.along(Axis::expert_tensor),
                     {architecture.experts, architecture.top_k, settings.dispatcher, settings.pad_to_capacity}),
          Experts(gate_up, down, beside_transfers), mesh.along(Axis::sequence), settings.capacity};
}

}  // namespace

ModelSettings model_settings(const RunConfig& run) {
  return {run.train.recompute, run.moe.dispatcher, {run.balance.capacity_factor, run.balance.drop_policy}, run.balance.pad_to_capacity};
}

FeedForward::FeedForward(Weights& weights, const Mesh& mesh, const std::string& prefix)
    : tensor_(mesh.along(Axis::tensor)),
      gate_up_(weights.add({prefix + "gate_proj.weight", prefix + "up_proj.weight"})),
      down_(weights.add({prefix + "down_proj.weight"})) {}

Tensor FeedForward::forward(const Tensor& x_TW, Remade& remade) {
  const TraceRange range("feed-forward");
  const Tensor gate_up = gathered_linear(tensor_, x_TW, gate_up_, remade).second, product = swiglu(gate_up);
  remade.add(product, [gate_up = gate_up.detach()] { return swiglu(gate_up); });
  return reduce_scatter_along(tensor_, linear(product, down_), 0);
}

Block::Block(Weights& weights, const Mesh& mesh, int64_t layer, const ModelSettings& settings)
    : layer_(layer),
      eps_(weights.architecture().rms_eps),
      recompute_(settings.recompute),
      attention_norm_(weights.add({prefix_of(layer) + "input_layernorm.weight"})),
      attention_(weights, mesh, layer, prefix_of(layer) + "self_attn."),
      feed_forward_norm_(weights.add({prefix_of(layer) + "post_attention_layernorm.weight"})) {
  const std::string prefix = prefix_of(layer) + "mlp.";
  if (weights.architecture().is_moe_layer(layer)) {
    moe_.emplace(make_moe(weights, mesh, layer, prefix, settings));
  } else {
    dense_.emplace(weights, mesh, prefix);
  }
}

Tensor Block::forward(const Tensor& x_TW, const Positions& positions, const RouterContext& context) {
  Routed routed;
  if (recompute_ != Recompute::full || !recording()) return compute(x_TW, positions, context, routed);
  Tensor y_TW;
  {
    const Unrecorded guard;
    y_TW = compute(x_TW, positions, context, routed);
  }
  const auto again = [this, positions, context, routed](const std::vector<Tensor>& inputs) mutable {
    return compute(inputs[0], positions, context, routed);
  };
  return recomputed(y_TW, {x_TW}, again);
}

Tensor Block::compute(const Tensor& x_TW, const Positions& positions, const RouterContext& context, Routed& routed) {
  const TraceRange range("layer", layer_);
  const bool selective = recompute_ == Recompute::selective;
  Remade in_attention(selective), in_feed_forward(selective);
  const auto [attended_TW, h_TW] = attend(x_TW, positions, in_attention);
  in_feed_forward.add(h_TW, [this, x = attended_TW.detach()] { return feed_forward_input(x); });
  return in_feed_forward.before(feed_forward(h_TW, context, routed, in_feed_forward, attended_TW));
}

Normed Block::attend(const Tensor& x_TW, const Positions& positions, Remade& remade) {
  const TraceRange range("attention");
  const auto [same_TW, h_TW] = rms_norm_beside(x_TW, attention_norm_, eps_);
  remade.add(h_TW, [this, x = x_TW.detach()] { return rms_norm(x, attention_norm_, eps_); });
  return add_rms_norm(same_TW, remade.before(attention_.forward(h_TW, positions, remade)), feed_forward_norm_, eps_);
}

Tensor Block::attend(const Tensor& x_TW, const Positions& positions) {
  Remade nothing(false);
  return attend(x_TW, positions, nothing).x_D;
}

Tensor Block::feed_forward_input(const Tensor& x_TW) { return rms_norm(x_TW, feed_forward_norm_, eps_); }

Tensor Block::feed_forward(const Tensor& h_TW, const RouterContext& context) {
  Routed routed;
  Remade nothing(false);
  return feed_forward(h_TW, context, routed, nothing, {});
}

Tensor Block::feed_forward(const Tensor& h_TW, const RouterContext& context, Routed& routed, Remade& remade,
                           const Tensor& onto_TW) {
  if (moe_) return moe_->forward(h_TW, context, routed, remade, onto_TW);
  const Tensor y_TW = dense_->forward(h_TW, remade);
  return onto_TW.defined() ? onto_TW + y_TW : y_TW;
}

}  // namespace upcycle
