#pragma once
#include <cstdint>

struct CUstream_st;

// Attention's outputs and gradients over parts of the keys, bf16, heads first: [B, H, S, D], rows of D numbers one after another, D a multiple
// of 8, all addresses and strides (in numbers) multiples of 8 numbers; fewer than 2^31 numbers. Sums in fp32, rounded once.
namespace upcycle::cuda {

struct Shape {
  int sequences, heads, positions, width;
};
struct Strides {
  int64_t sequence, head, position;
};
struct Heads {
  void* numbers;
  Strides strides;
};
struct Sums {   ///< fp32 [B, H, S], any strides
  float* numbers;
  Strides strides;
};

/// lse = log(exp(lse_a) + exp(lse_b)); out = exp(lse_a - lse) a + exp(lse_b - lse) b
struct PartsMerge {
  Shape shape;
  Heads out, a, b;
  Sums lse, lse_a, lse_b;
};
void merge_parts(const PartsMerge&, CUstream_st*);

/// to = parts[0] + ... + parts[count - 1], in this order
struct PartsSum {
  static constexpr int kMost = 4;
  Shape shape;
  Heads to;
  Heads parts[kMost];
  int count;
};
void sum_parts(const PartsSum&, CUstream_st*);

}  // namespace upcycle::cuda
