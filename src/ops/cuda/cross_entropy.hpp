#pragma once
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

/// Rows of logits: the columns of the ids first .. first + columns - 1 of a vocabulary. See ops/cross_entropy.hpp for what is computed.
struct CrossEntropy {
  void* logits;            ///< [rows, columns], `stride` numbers from row to row
  bool bf16;               ///< else fp32
  int64_t rows, columns, stride;
  const int64_t* labels;   ///< [rows]
  int64_t first;
  const float* weights;    ///< [rows]; not for softmax_sums
  float *largest, *sums, *label_logits;   ///< [rows]; not for cross_entropy
  float* losses;           ///< [rows]; for cross_entropy only
};

/// Writes largest, sums and label_logits; reads the logits once.
void softmax_sums(const CrossEntropy&, CUstream_st*);
/// The logits become their gradient; reads largest and sums.
void cross_entropy_gradient(const CrossEntropy&, CUstream_st*);
/// Both at once for columns that are the whole vocabulary: writes the losses, and the gradient over the logits. Memory sees the logits
/// read once and written once: what of a row is not kept in shared memory comes back from L2.
void cross_entropy(const CrossEntropy&, CUstream_st*);

}  // namespace upcycle::cuda
