#pragma once
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

/// Partial sums of squares, times `share`; one a block, always the same numbers in the same order, on any GPU.
struct SquareSums {
  const float* x;
  int64_t size;
  double share;
  double* partials;   ///< [square_sum_blocks(size)]
};
int square_sum_blocks(int64_t size);
/// Squares are summed four by four in fp32 and then in fp64. Reads x once.
void sum_squares(const SquareSums&, CUstream_st*);

}  // namespace upcycle::cuda
