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
  double* squares = nullptr;   ///< of weight_gradient: [E * square_sums_of_expert()], whose sum is that of the result's squares; or null
  const int32_t* end;   ///< [E], on the device: expert e owns rows end[e-1] .. end[e]
  int experts;
  int64_t in, out;      ///< multiples of 8; all three addresses are multiples of 16
  /// Blocks of each processor, one after another, that share the tiles evenly. One is fastest where nothing else computes; but a block
  /// that finds its processor taken, by NCCL above all, begins when that ends, and does its share then, while all others idle: with more blocks
  /// such a share is small, and whoever is free takes the next.
  int rounds = 1;
  void* workspace;      ///< grouped_gemm_workspace() bytes on the device, its address a multiple of 256, till the kernel is done
  CUstream_st* stream;
};

/// True where the kernels run on the current GPU.
bool has_grouped_gemm();
int64_t grouped_gemm_workspace(int experts, int rounds);
/// Partial sums of squares of one expert's weight gradient: one a warp and tile, in fp32 within a part of a tile, then in fp64.
int64_t square_sums_of_expert(GroupedTile, int64_t out, int64_t in);
/// Every number of a result is written by one block, once: the same bits each time. Throws std::runtime_error when the launch is refused.
void grouped_gemm(GroupedProduct, GroupedTile, const GroupedGemm&);

}  // namespace upcycle::cuda
