#pragma once
#include <cstdint>

struct CUstream_st;

// Products of many pairs of matrices in one launch, bf16 times bf16, for Hopper (compute capability 9.0 only). What each expert has is read
// on the device: the host never learns it. Made of CUTLASS's grouped kernel (github.com/NVIDIA/cutlass, BSD), see grouped_gemm.cuh.
// Shapes: R rows sorted by expert, E experts, I inputs, O outputs; all row-major without gaps.
namespace upcycle::cuda {

enum class GroupedProduct {
  forward,          ///< y [R, O] bf16 = x [R, I] times weight [E, O, I] transposed
  input_gradient,   ///< dx [R, I] bf16 = dy [R, O] times weight [E, O, I]
  weight_gradient,  ///< main_grad [E, O, I] fp32 = dy [R, O] transposed times x [R, I]; zeros where an expert has no rows
  added_weight_gradient   ///< main_grad += the same; where an expert has no rows it is not touched
};

/// How much of a result one block makes at a time.
enum class GroupedTile {
  wide,    ///< 128 x 256, both groups of warps on one tile: fewest reads
  square   ///< 128 x 128, a tile each in turns: one's result is written while the other multiplies
};

struct GroupedGemm {
  const void* left;     ///< x (forward), else dy
  const void* right;    ///< weight; x for weight_gradient
  void* result;
  const int32_t* end;   ///< [E], on the device: expert e owns rows end[e-1] .. end[e]
  int experts;
  int64_t in, out;      ///< multiples of 8; all three addresses are multiples of 16
  void* workspace;      ///< grouped_gemm_workspace(experts) bytes on the device, its address a multiple of 256, till the kernel is done
  CUstream_st* stream;
};

/// True where the kernels run on the current GPU.
bool has_grouped_gemm();
int64_t grouped_gemm_workspace(int experts);
/// Every number of a result is written by one block, once: the same bits each time. Throws std::runtime_error when the launch is refused.
void grouped_gemm(GroupedProduct, GroupedTile, const GroupedGemm&);

}  // namespace upcycle::cuda
