#pragma once
#include <optional>

#include "model/attention.hpp"
#include "moe/moe_layer.hpp"
#include "ops/rms_norm.hpp"

// Shapes: T token rows of this rank, W width of the model.
namespace upcycle {

/// How the model computes. Nothing of it changes what is stored.
struct ModelSettings {
  Recompute recompute = Recompute::none;
  Dispatch dispatcher = Dispatch::automatic;
  CapacitySettings capacity;
  bool pad_to_capacity = false;
};
ModelSettings model_settings(const RunConfig&);

/// The dense feed-forward, down(silu(gate x) * up x); its width is cut over `tensor`, its rows are gathered and scattered again.
class FeedForward {
 public:
  FeedForward(Weights&, const Mesh&, const std::string& prefix);
  /// **Collective** over the tensor group. x [T, W] -> [T, W]. Adds what it can make again to `remade`, from x on.
  Tensor forward(const Tensor& x_TW, Remade& remade);

 private:
  const Communicator& tensor_;
  Parameter& gate_up_;
  Parameter& down_;
};

/// One decoder layer: x + attention(norm(x)), then x + feed-forward(norm(x)), the latter dense or a mixture of experts.
/// What backward needs is kept, or computed again: of recompute = "selective", what costs memory but little time (norms, gathered rows,
/// rotated heads, silu(gate) * up, the experts' rows where they are at home); of "full", all but the layer's input. A layer that is
/// computed again sends its rows where they went the first time.
class Block {
 public:
  Block(Weights&, const Mesh&, int64_t layer, const ModelSettings&);

  /// **Collective** over the expert and tensor groups. x [T, W] -> [T, W].
  Tensor forward(const Tensor& x_TW, const Positions& positions, const RouterContext& context);

  /// The two halves, for whoever wants to look between them (the certificate).
  Tensor attend(const Tensor& x_TW, const Positions& positions);
  Tensor feed_forward_input(const Tensor& x_TW);
  Tensor feed_forward(const Tensor& h_TW, const RouterContext& context);

  int64_t layer() const noexcept { return layer_; }
  /// Null for a dense layer.
  MoeLayer* moe() noexcept { return moe_ ? &*moe_ : nullptr; }

 private:
  /// x + attention(norm(x)) beside its own norm, which feed_forward_input gives, too.
  Normed attend(const Tensor& x_TW, const Positions& positions, Remade& remade);
  /// Onto `onto_TW`, unless it is undefined.
  Tensor feed_forward(const Tensor& h_TW, const RouterContext& context, Routed& routed, Remade& remade, const Tensor& onto_TW);
  Tensor compute(const Tensor& x_TW, const Positions& positions, const RouterContext& context, Routed& routed);

  int64_t layer_;
  double eps_;
  Recompute recompute_;
  Parameter& attention_norm_;
  Attention attention_;
  Parameter& feed_forward_norm_;
  std::optional<FeedForward> dense_;
  std::optional<MoeLayer> moe_;
};

}  // namespace upcycle
