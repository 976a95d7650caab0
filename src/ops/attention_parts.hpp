#pragma once
#include <vector>

#include "ops/dense_attention.hpp"

// What attention over parts of the keys needs beside the dense kernels. All tensors are heads first, [B, H, S, D], with any strides but in D;
// sums are fp32, rounded once. On a GPU one pass each for bf16, else as written out.
namespace upcycle {

/// Of queries that see two sets of keys: attention over both, of that over each. lse = log(exp(a.lse) + exp(b.lse)); out = exp(a.lse - lse)
/// a.out + exp(b.lse - lse) b.out (as in ring attention, Liu et al., 2310.01889). `lse` fp32 [B, H, S], any strides.
void merge_parts(Tensor out_BHSD, Tensor lse_BHS, const Dense& a, const Dense& b);
void merge_parts_written_out(Tensor out_BHSD, Tensor lse_BHS, const Dense& a, const Dense& b);

/// to = the sum of `parts`, one at least, in their order.
void sum_parts(Tensor to_BHSD, const std::vector<Tensor>& parts_BHSD);
void sum_parts_written_out(Tensor to_BHSD, const std::vector<Tensor>& parts_BHSD);

}  // namespace upcycle
