#pragma once
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

/// gradients[id] += the sum of dy[n] over all n with ids[n] == id, fp32, in a fixed order.
struct EmbeddingGradient {
  const void* dy;         ///< [rows, width]
  bool bf16;              ///< else fp32
  int64_t rows, width;
  const int64_t* sorted;  ///< [rows], the ids in order
  const int64_t* order;   ///< [rows]: where in dy the row of each sorted id is
  float* gradients;       ///< [ids, width]
};
/// Reads dy once; reads and writes the rows of ids that are there, no others.
void add_embedding_gradient(const EmbeddingGradient&, CUstream_st*);

}  // namespace upcycle::cuda
