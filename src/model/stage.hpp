#pragma once
#include <deque>

#include "model/block.hpp"

// Shapes: B sequences, S positions, T = B*S tokens, W width of the model, V vocabulary.
namespace upcycle {

/// The part of the model that one pipeline stage holds: its layers, and at the ends the embedding and the head.
class Stage {
 public:
  /// Nothing is allocated until weights().allocate(). `mesh` must outlive the stage.
  Stage(const Architecture&, const Layout&, const Mesh& mesh);

  /// int64 ids [B, S] -> [B, S, W], in the compute dtype.
  Tensor embed(const Tensor& tokens_BS);
  /// Through this stage's layers.
  Tensor blocks(const Tensor& x_BSW, const BalanceLoss& balance);
  /// The final norm and the head: [T, V], in the compute dtype.
  Tensor logits(const Tensor& x_BSW);
  /// Cross entropy of every token, fp32 [T].
  Tensor token_losses(const Tensor& x_BSW, const Tensor& labels_BS);

  std::deque<Block>& layers() noexcept { return blocks_; }
  Weights& weights() noexcept { return weights_; }
  const Architecture& architecture() const noexcept { return weights_.architecture(); }
  const RotaryTable& rotary(int64_t positions);
  /// Statistics of the stage's routers, by layer; empty for a dense model.
  std::vector<Router*> routers();

 private:
  Weights weights_;
  Parameter* embedding_ = nullptr;
  std::deque<Block> blocks_;
  Parameter* final_norm_ = nullptr;
  Parameter* head_ = nullptr;     ///< the embedding itself where the model is tied
  RotaryTable rotary_;
};

}  // namespace upcycle
