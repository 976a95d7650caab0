#pragma once
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

/// sum [width] += the rows of partial [rows, width], fp32, always in the same order.
struct ColumnSums {
  const float* partial;
  int64_t rows;
  int width;
  float* sum;
};

/// The second stage of a weight gradient: the blocks of a backward have written their own sums, this adds them up. Two weights in one
/// launch; a width of 0 is none.
void add_column_sums(const ColumnSums& a, const ColumnSums& b, CUstream_st* stream);

}  // namespace upcycle::cuda
