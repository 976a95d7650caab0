#pragma once
#include "base/tensor.hpp"

// Shapes: T tokens, K choices of each, R = T*K rows, D width. A choice (t, k) is number t*K + k.
namespace upcycle {

/// How rows are sorted by expert. `choice_R`: the choice that each row is of, sorted by expert, ties in order of the choice;
/// `row_TK`: its inverse, the row of each choice. int64, on the device of the experts.
struct RowOrder {
  Tensor choice_R;
  Tensor row_TK;
};
RowOrder sort_by_expert(const Tensor& expert_TK);

/// x_RD: for each row its token's x. Backward sums a token's K rows in fp32, in the order of K: the same on any layout.
Tensor spread_rows(const Tensor& x_TD, const RowOrder& order);

/// y_TD = sum_k weight[t, k] * y[row(t, k)], in fp32, in the order of k. `weight_TK` fp32.
Tensor weigh_and_sum(const Tensor& y_RD, const Tensor& weight_TK, const RowOrder& order);

/// x[permutation]; `permutation` int64 [R] is a permutation of the rows. Backward goes the other way.
Tensor permute_rows(const Tensor& x_RD, const Tensor& permutation_R);

}  // namespace upcycle
