#pragma once
#include <optional>

#include "base/tensor.hpp"

// Shapes: T tokens, K choices of each, R rows, D width, E experts. A choice (t, k) is number t*K + k.
namespace upcycle {

/// How choices become rows, sorted by expert, ties in order of the choice. `choice_R`: the choice that each row is of; `row_TK`: the row
/// of each choice. int64, on the device of the experts. A row of no choice has the number T*K there (and holds zeros), a choice without
/// a row the number R (and counts as zeros).
struct RowOrder {
  Tensor choice_R;
  Tensor row_TK;
  Tensor end_E;               ///< int32: expert e of those sorted by owns rows end[e-1] .. end[e], slots without a choice included
  bool every_row = true;      ///< has a choice
  bool every_choice = true;   ///< has a row
};
/// All choices, of experts 0 .. experts: R = T*K.
RowOrder sort_by_expert(const Tensor& expert_TK, int64_t experts);
/// The choices of experts first .. first + experts alone, `rows` of them; no other choice has a row.
RowOrder sort_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t rows);
/// The same with `slots` rows for each of these experts, of which each has that many choices at most: nothing of the shapes depends on
/// what was chosen.
RowOrder slots_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t slots);
/// int64 [experts]: how many of the choices fall to each expert first .. first + experts. Nothing waits.
Tensor count_choices(const Tensor& expert_TK, int64_t experts, int64_t first = 0);

/// The same rows for tensors that have a row for each choice, [T*K, ...], instead of one for each token.
RowOrder by_choice(const RowOrder&);

/// int64 permutation of 0 .. R-1 -> its inverse.
Tensor inverse_of(const Tensor& permutation_R);

/// x_RD: for each row its token's x. Backward sums a token's rows in fp32, in the order of K: the same on any layout.
Tensor spread_rows(const Tensor& x_TD, const RowOrder& order);

/// x_TD: the sum of each token's rows, in fp32, in the order of K, then rounded to `dtype` (default: y's). Backward gives each row its
/// token's gradient: one is the other's transpose.
Tensor sum_rows(const Tensor& y_RD, const RowOrder& order, std::optional<at::ScalarType> dtype = {});

/// onto + sum_rows(y), rounded once to the dtype of `onto` [T, D], which is added last. Backward hands the gradient on to both.
Tensor add_rows(const Tensor& onto_TD, const Tensor& y_RD, const RowOrder& order);

/// x[permutation]; `permutation` int64 [R] is a permutation of the rows. Backward goes the other way.
Tensor permute_rows(const Tensor& x_RD, const Tensor& permutation_R);

// What these are on a CPU, and what a GPU's kernels are held against: the same numbers, the sums but for their rounding in fp32.
RowOrder sort_by_expert_written_out(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t rows);
RowOrder slots_by_expert_written_out(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t slots);
Tensor count_choices_written_out(const Tensor& expert_TK, int64_t experts, int64_t first);
Tensor spread_rows_written_out(const Tensor& x_TD, const RowOrder& order);
Tensor sum_rows_written_out(const Tensor& y_RD, const RowOrder& order, std::optional<at::ScalarType> dtype = {});
Tensor add_rows_written_out(const Tensor& onto_TD, const Tensor& y_RD, const RowOrder& order);

}  // namespace upcycle
