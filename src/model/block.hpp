#pragma once
#include <optional>

#include "model/attention.hpp"
#include "moe/moe_layer.hpp"

// Shapes: T token rows of this rank, W width of the model.
namespace upcycle {

/// The dense feed-forward, down(silu(gate x) * up x); its width is cut over `tensor`, its rows are gathered and scattered again.
class FeedForward {
 public:
  FeedForward(Weights&, const Mesh&, const std::string& prefix);
  /// **Collective** over the tensor group. x [T, W] -> [T, W].
  Tensor forward(const Tensor& x_TW);

 private:
  const Communicator& tensor_;
  Parameter& gate_up_;
  Parameter& down_;
};

/// One decoder layer: x + attention(norm(x)), then x + feed-forward(norm(x)), the latter dense or a mixture of experts.
class Block {
 public:
  Block(Weights&, const Mesh&, int64_t layer);

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
  int64_t layer_;
  double eps_;
  Parameter& attention_norm_;
  Attention attention_;
  Parameter& feed_forward_norm_;
  std::optional<FeedForward> dense_;
  std::optional<MoeLayer> moe_;
};

}  // namespace upcycle
