// Between grouped_gemm.cu and the files of the single kernels.
#pragma once
#include "ops/cuda/grouped_gemm.hpp"

namespace upcycle::cuda {

/// Of the sizes, addresses and strides of all groups.
inline int64_t bytes_of_groups(int experts) { return 7 * ((12LL * experts + 255) / 256 * 256); }
/// CUTLASS's descriptors: A, B and at most two of the result for each of the GPU's processors; a few for rounding.
inline int64_t bytes_of_descriptors(int processors) { return 128LL * 4 * processors + 1024; }

void forward_wide(const GroupedGemm&, int processors);
void input_gradient_wide(const GroupedGemm&, int processors);
void weight_gradient_wide(const GroupedGemm&, int processors);
void weight_gradient_square(const GroupedGemm&, int processors);
void added_weight_gradient_wide(const GroupedGemm&, int processors);
void added_weight_gradient_square(const GroupedGemm&, int processors);

}  // namespace upcycle::cuda
