#pragma once
#include "base/autograd.hpp"
#include "config/architecture.hpp"
#include "model/weights.hpp"
#include "model/positions.hpp"
#include "parallel/mesh.hpp"

// Shapes: T token rows of this rank, B sequences, S positions of each on this context rank and P in all, H query heads and G key/value
// heads of this rank, D head width, W width of the model.
namespace upcycle {

/// Qwen3's attention: grouped queries, an RMS norm on each head of q and k, rotary positions. Heads are cut over `tensor`; with
/// fewer key/value heads than tensor ranks, neighbours hold the same one.
class Attention {
 public:
  Attention(Weights&, const Mesh&, int64_t layer, const std::string& prefix);
  /// **Collective** over the tensor and context groups. x [T, W] -> [T, W]. Adds what it can make again to `remade`, from x on.
  Tensor forward(const Tensor& x_TW, const Positions& positions, Remade& remade);

 private:
  const Communicator& tensor_;
  const Communicator& context_;
  int64_t layer_;
  double eps_;
  Parameter& qkv_;              ///< q alone where there is a kv_
  Parameter* kv_ = nullptr;     ///< where tensor ranks share key/value heads: other ranks hold them than hold q
  Parameter& q_norm_;
  Parameter& k_norm_;
  Parameter& out_;
  int64_t heads_, kv_heads_;    ///< on this rank
};

}  // namespace upcycle
