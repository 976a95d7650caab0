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

/// Bytes of a rank's logits that exist at a time, about. Fewer make the sums into the head's gradient, which is read and written once for
/// each chunk, cost more: at 16,384 tokens of width 2048 on an H100 both ways took 56.1, 53.4, 49.9, 49.6 ms with 256, 512, 1024, 2048 MiB.
/// Lowered by tests.
inline int64_t logits_bytes_on_gpu = int64_t{1} << 30;
inline int64_t logits_bytes_on_cpu = int64_t{128} << 20;
/// Token rows of one chunk, at least one: `rows` in equal chunks, of logits of `vocab` numbers of `width` bytes on each rank.
int64_t rows_at_a_time(int64_t rows, int64_t vocab, int64_t width, bool gpu);

/// **Collective** over `tensor`. The head and the loss: sum of weight * -log softmax(x head^T)[label] over the tokens, fp64 scalar, the same
/// on all ranks. x [N, W] in any dtype, labels int64 [N], weights fp32 [N]: 0 for labels that are not learned; `vocab` ids in all. No more
/// logits than one chunk's exist at any time, each computed once: in the head's dtype, loss and gradient in fp32.
/// Recording, **forward computes the gradients**, since the weights say all that they depend on: main_grad of the head is added to at once,
/// the gradient of x is kept. So the loss must be what backward starts from, with the gradient 1, once: any other throws std::logic_error
/// on a CPU; on a GPU, where the host does not look, it makes the gradient of x, and with it the norm of the step, not a number.
/// Parameter::ready is called in backward, as every op does.
Tensor vocabulary_loss(const Communicator& tensor, const Tensor& x_NW, Parameter& head_VW, const Tensor& labels_N, const Tensor& weight_N,
                       int64_t first, int64_t vocab);

/// **Collective** over `tensor`. The logits of the whole vocabulary [N, vocab]; for looking at them, nothing is recorded.
Tensor whole_logits(const Communicator& tensor, const Tensor& logits_NV, int64_t first, int64_t vocab);

}  // namespace upcycle
