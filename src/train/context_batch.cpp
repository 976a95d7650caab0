#include "train/context_batch.hpp"

#include "parallel/zigzag.hpp"

namespace upcycle {

Batch of_context_rank(const Batch& batch, int ranks, int rank) {
  const auto held = [&](const Tensor& x_BS) { return x_BS.defined() ? take_zigzag(x_BS, ranks, rank) : x_BS; };
  return {held(batch.tokens_BS), held(batch.labels_BS), held(batch.starts_BS), held(batch.learn_BS)};
}

}  // namespace upcycle
