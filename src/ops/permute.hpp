#pragma once
#include <optional>

#include "base/tensor.hpp"

// Shapes: T tokens, K choices of each, R rows, D width. A choice (t, k) is number t*K + k.
namespace upcycle {

/// How choices become rows, sorted by expert, ties in order of the choice. `choice_R`: the choice that each row is of; `row_TK`: the row
/// of each choice. int64, on the device of the experts. A row of no choice has the number T*K there (and holds zeros), a choice without
/// a row the number R (and counts as zeros).
struct RowOrder {
  Tensor choice_R;
  Tensor row_TK;
  bool every_row = true;      ///< has a choice
  bool every_choice = true;   ///< has a row
};
/// All choices: R = T*K.
RowOrder sort_by_expert(const Tensor& expert_TK);
/// The choices of experts first .. first + experts alone, `rows` of them; no other choice has a row.
RowOrder sort_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t rows);
/// The same with `slots` rows for each of these experts, of which each has that many choices at most: nothing of the shapes depends on
/// what was chosen.
RowOrder slots_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t slots);
/// int64 [experts]: how many of the choices fall to each expert first .. first + experts. Nothing waits.
Tensor count_choices(const Tensor& expert_TK, int64_t experts, int64_t first = 0);

/// int64 permutation of 0 .. R-1 -> its inverse.
Tensor inverse_of(const Tensor& permutation_R);

/// x_RD: for each row its token's x. Backward sums a token's rows in fp32, in the order of K: the same on any layout.
Tensor spread_rows(const Tensor& x_TD, const RowOrder& order);

/// y_TD = sum_k weight[t, k] * y[row(t, k)], summed in fp32 in the order of k, then rounded to `dtype` (default: y's). `weight_TK` fp32.
Tensor weigh_and_sum(const Tensor& y_RD, const Tensor& weight_TK, const RowOrder& order, std::optional<at::ScalarType> dtype = {});

/// x[permutation]; `permutation` int64 [R] is a permutation of the rows. Backward goes the other way.
Tensor permute_rows(const Tensor& x_RD, const Tensor& permutation_R);

}  // namespace upcycle
