#pragma once
#include <cstdint>

struct CUstream_st;

// Shapes: R rows, F width; numbers are bf16 or fp32, all of one kind; sums and products in fp32, rounded once.
namespace upcycle::cuda {

/// product = weight * silu(gate) * up
struct Swiglu {
  const void* gate_up;    ///< [R, 2F], the gate first
  const float* weight;    ///< [R], or null: ones
  void* product;          ///< [R, F]
  int64_t rows, width;
  bool bf16;
};
void swiglu(const Swiglu&, CUstream_st*);

struct SwigluBackward {
  const void* gate_up;    ///< [R, 2F]
  const float* weight;    ///< [R], or null: ones
  const void* d_product;  ///< [R, F]
  void* d_gate_up;        ///< [R, 2F]
  float* d_weight;        ///< [R], or null: not wanted
  int64_t rows, width;
  bool bf16;
};
void swiglu_backward(const SwigluBackward&, CUstream_st*);

}  // namespace upcycle::cuda
