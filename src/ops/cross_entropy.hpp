#pragma once
#include "base/tensor.hpp"

// Shapes: T tokens, V vocabulary.
namespace upcycle {

/// -log softmax(logits)[label] of every token, fp32 [T]; logits [T, V] of any dtype, computed in fp32; labels int64 [T].
Tensor cross_entropy(const Tensor& logits_TV, const Tensor& labels_T);

}  // namespace upcycle
