#pragma once
#include "ops/parameter.hpp"
#include "parallel/communicator.hpp"

// Both ends of the model with the vocabulary cut over the tensor group: each rank holds the rows of consecutive token ids, from
// `first` on (Megatron-LM's VocabParallelEmbedding and vocab_parallel_cross_entropy). Parts differ by a row where the vocabulary
// does not divide: there are no padding rows, so neither loss nor checkpoint depends on the number of ranks.
// Shapes: B sequences, S positions, T token rows of this rank, N = B*S token rows of the whole tensor group, V rows of the
// vocabulary on this rank, W width of the model.
namespace upcycle {

/// **Collective** over `tensor`. int64 ids [B, S], the same on all its ranks -> this rank's slice of their embeddings [T, W].
Tensor embed_tokens(const Communicator& tensor, const Tensor& ids_BS, Parameter& embedding_VW, int64_t first);

/// **Collective** over `tensor`. -log softmax(logits)[label] of every token, fp32 [N], the same on all ranks; computed in fp32 from
/// this rank's logits [N, V]; labels int64 [N].
Tensor vocabulary_cross_entropy(const Communicator& tensor, const Tensor& logits_NV, const Tensor& labels_N, int64_t first);

/// **Collective** over `tensor`. The logits of the whole vocabulary [N, vocab]; for looking at them, nothing is recorded.
Tensor whole_logits(const Communicator& tensor, const Tensor& logits_NV, int64_t first, int64_t vocab);

}  // namespace upcycle
