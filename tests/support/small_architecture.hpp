#pragma once
#include "config/architecture.hpp"

namespace upcycle {

/// A dense layer and one of 8 experts, with all kinds of weights.
inline Architecture small() {
  Architecture a;
  a.hidden = 24, a.layers = 2, a.heads = 4, a.kv_heads = 2, a.head_dim = 6, a.ffn = 48, a.vocab = 101;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 10, a.dense_layers = {0};
  return a;
}

}  // namespace upcycle
