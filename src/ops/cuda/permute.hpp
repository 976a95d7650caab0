#pragma once
#include <cstdint>

struct CUstream_st;

// Shapes: T tokens, K choices of each, R rows (below 2^31), D width. row[t * K + k] is the row of choice k of token t; R or more: it has none.
namespace upcycle::cuda {

/// y[row] = x[t] for each choice that has a row: x is read once.
struct RowCopies {
  const void* x;             ///< [T, D], of any kind
  const int64_t* row;        ///< [T, K]
  const int64_t* choice;     ///< [R]: the choice of each row; those of T*K or more get zeros. Null: every row has one
  void* y;                   ///< [R, D]
  int64_t tokens, choices, rows;
  int64_t row_bytes, number_bytes;   ///< of D numbers and of one: 2 or 4
};
void copy_rows(const RowCopies&, CUstream_st*);

/// x[t] = the sum of y[row] over the token's choices in their order, and of onto[t], in fp32, rounded once.
struct RowSums {
  const void* y;             ///< [R, D], bf16 or fp32
  const int64_t* row;        ///< [T, K]
  const void* onto;          ///< [T, D], of x's kind; null: nothing is added
  void* x;                   ///< [T, D], of y's kind or fp32
  int64_t tokens, choices, rows, width;
  bool bf16, bf16_out;
};
void sum_rows(const RowSums&, CUstream_st*);

}  // namespace upcycle::cuda
