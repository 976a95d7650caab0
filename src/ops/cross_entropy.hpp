#pragma once
#include "base/tensor.hpp"

// Cross entropy and its gradient from logits that are not kept. The gradient of a token's loss, its `weight`, is known before backward
// (1 / learned tokens of the step, 0 where a label is not learned), so nothing has to wait for it. Nothing here is recorded: the op that
// owns the logits is model/vocabulary.hpp's.
// Shapes: T tokens, V columns: a vocabulary, or of one that is cut over ranks the ids first .. first + V - 1.
namespace upcycle {

/// What so many columns say of each row, fp32 [T].
struct SoftmaxSums {
  Tensor largest_T;   ///< logit
  Tensor sum_T;       ///< of exp(logit - largest)
  Tensor label_T;     ///< the label's logit; 0 where it is not among the columns
};

/// `logits` bf16 or fp32, rows contiguous, V > 0; labels int64. Computed in fp32.
SoftmaxSums softmax_sums(const Tensor& logits_TV, const Tensor& labels_T, int64_t first = 0);

/// weight * -log softmax(logits)[label] of each token, fp32 [T], from the sums of the whole vocabulary; 0 where the weight is 0, whatever
/// the logits. weight fp32.
Tensor weighted_losses(const SoftmaxSums& whole, const Tensor& weight_T);

/// In place: the logits become the gradient of the sum of weighted_losses, weight * (softmax(logits) - onehot(label)), rounded once;
/// zeros where the weight is 0, whatever the logits.
void cross_entropy_gradient(Tensor logits_TV, const Tensor& labels_T, const Tensor& weight_T, const SoftmaxSums& whole, int64_t first = 0);

/// All three where the columns are the whole vocabulary: returns weighted_losses and leaves the gradient in `logits`. On a GPU one kernel,
/// which reads and writes the logits once.
Tensor cross_entropy(Tensor logits_TV, const Tensor& labels_T, const Tensor& weight_T);

// The plain forms, on any device, for tests.
SoftmaxSums softmax_sums_written_out(const Tensor& logits_TV, const Tensor& labels_T, int64_t first = 0);
void cross_entropy_gradient_written_out(Tensor logits_TV, const Tensor& labels_T, const Tensor& weight_T, const SoftmaxSums& whole,
                                        int64_t first = 0);

}  // namespace upcycle
