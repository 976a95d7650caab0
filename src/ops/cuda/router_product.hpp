#pragma once
#include <cstdint>

struct CUstream_st;

// A product of bf16 and fp32 on the units for bf16. An fp32 number is the sum of three of bf16 (3 x 8 bits), and products of two bf16
// numbers are exact in fp32. The units cut off what does not fit into their sums, so those are kept short: 32 terms, then added outside
// (Ootomo and Yokota, 2203.03341). Shapes: T rows, D width, E outputs, F: E rounded up to whole tiles. Row-major, on one GPU.
namespace upcycle::cuda {

/// fp32 numbers as sums of bf16 numbers, zeros around them.
struct Terms {
  const float* x_RC;
  int64_t rows, columns;                   ///< R, C
  int64_t padded_rows, padded_columns;     ///< the latter a multiple of 8
  void* out;                               ///< bf16, 16 bytes: row r of slot s begins at s * slot_stride + r * row_stride
  int64_t slot_stride, row_stride;         ///< in numbers, multiples of 8
  int slots;
  int term[6];                             ///< which term (0: the largest, 1, 2) a slot gets
};
void split_into_terms(const Terms&, CUstream_st*);

/// F of so many outputs.
int64_t padded_outputs(int64_t outputs);

struct RouterProduct {
  const void* x_TD;                        ///< bf16; D a multiple of 8, the address of 16 bytes
  const void* terms;                       ///< bf16, slots 0 to 2 of them: of the weight [F, D], or of the outputs' gradients [T, F]
  int64_t slot_stride, row_stride;         ///< of the terms, as above
  float* out;                              ///< logits [T, E]; or partial sums [splits, E, D]
  int64_t rows, width, outputs;            ///< T, D, E
  int64_t splits;                          ///< of the rows, for the weight's gradient
};
/// out = x W^T.
void router_product(const RouterProduct&, CUstream_st*);
/// out[s] = dy^T x over the s-th part of the rows.
void router_weight_gradient(const RouterProduct&, CUstream_st*);
/// As many parts as keep a large GPU busy; the same on any GPU.
int64_t row_splits(int64_t rows, int64_t width, int64_t outputs);

/// sum [size] += partial[0] + ... + partial[splits - 1], in this order.
void add_partial_sums(float* sum, const float* partial, int64_t size, int64_t splits, CUstream_st*);

}  // namespace upcycle::cuda
