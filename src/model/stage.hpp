#pragma once
#include <deque>

#include "model/block.hpp"

// Shapes: B sequences, S positions of each on this context rank, N = B*S token rows, T of them on this rank of the tensor group,
// W width of the model, V vocabulary.
namespace upcycle {

/// The part of the model that one pipeline stage holds: the layers of its chunks, and at the ends the embedding and the head.
class Stage {
 public:
  /// Nothing is allocated until weights().allocate(). `mesh` must outlive the stage.
  Stage(const Architecture&, const Layout&, const Mesh& mesh, const ModelSettings& settings = {});

  /// Where the rows of `sequences` sequences stand, of each of which this context rank holds `held` positions. starts [B, S], on the
  /// host: where in its sequence the document of each of these begins (undefined: attention crosses the borders of documents).
  Positions positions(int64_t sequences, int64_t held, const Tensor& starts_BS = {});
  /// The same of `held` further positions of `sequences` sequences whose keys and values so far are in `before`, and which pass through
  /// the layers next. For looking at: nothing is recorded, and no sequence is cut over context ranks (std::logic_error).
  Positions positions_after(KeyValues& before, int64_t sequences, int64_t held);
  /// **Collective** over the tensor group, as all that follow. int64 ids [B, S] -> [T, W], in the compute dtype.
  Tensor embed(const Tensor& tokens_BS);
  /// Through the layers of `chunk` (see Layout), which is one of this stage's.
  Tensor blocks(const Tensor& x_TW, const Positions& positions, const RouterContext& context, int chunk = 0);
  /// The final norm, the head and the loss: the sum over the tokens of weight (fp32 [B, S]) times cross entropy, fp64 scalar, the same on all
  /// tensor ranks. Backward starts from it, with the gradient 1 (see vocabulary_loss).
  Tensor loss(const Tensor& x_TW, const Tensor& labels_BS, const Tensor& weight_BS);
  /// The final norm and the head, in the compute dtype: [N, V], whole on every rank. For looking at, not for training.
  Tensor logits(const Tensor& x_TW);

  /// Memory for what stands between two layers on this rank: the token rows of so many positions, over all sequences, of its context rank.
  Tensor room(int64_t positions) const;

  /// Of all chunks, in the model's order.
  std::deque<Block>& layers() noexcept { return blocks_; }
  Weights& weights() noexcept { return weights_; }
  const Architecture& architecture() const noexcept { return weights_.architecture(); }
  /// Statistics of the stage's routers, by layer; empty for a dense model.
  std::vector<Router*> routers();

 private:
  Tensor before_head(const Tensor& x_TW);   ///< [N, W]
  Parameter* vocabulary(const std::string& name);

  const Communicator& tensor_;
  const Communicator& context_;
  Weights weights_;
  Parameter* embedding_ = nullptr;
  std::deque<Block> blocks_;
  Parameter* final_norm_ = nullptr;
  Parameter* head_ = nullptr;     ///< the embedding itself where the model is tied
  int64_t first_token_ = 0;       ///< embedding and head hold the rows of this token and the following
  RotaryTable rotary_;            ///< of the positions that positions() was last asked for, or of all that a KeyValues has room for
};

}  // namespace upcycle
