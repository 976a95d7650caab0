#include "ops/permute.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

Tensor count_up_to(int64_t size, const Tensor& like) { return at::arange(size, like.options()); }

/// Experts of the range by their number in it; all others: `experts`. [T*K]
Tensor numbers_in_range(const Tensor& expert_TK, int64_t first, int64_t experts) {
  const Tensor number = expert_TK.reshape({-1}) - first;
  return at::where(number.ge(0).logical_and_(number.lt(experts)), number, experts);
}

/// int64 [size]: how often each number occurs. By hand, for bincount makes the host wait for a GPU.
Tensor occurrences(const Tensor& number_N, int64_t size) {
  return at::zeros({size}, number_N.options()).scatter_add_(0, number_N, at::ones_like(number_N));
}

/// With a last row of zeros, which the numbers T*K and R of a RowOrder point to.
Tensor with_nothing(const Tensor& x_RD) { return at::cat({x_RD, at::zeros({1, x_RD.size(1)}, x_RD.options())}, 0); }

}  // namespace

Tensor inverse_of(const Tensor& permutation_R) {
  return at::empty_like(permutation_R).scatter_(0, permutation_R, count_up_to(permutation_R.size(0), permutation_R));
}

RowOrder sort_by_expert(const Tensor& expert_TK) {
  const Tensor choice_R = at::argsort(expert_TK.reshape({-1}), /*stable=*/true);
  return {choice_R, inverse_of(choice_R).view(expert_TK.sizes())};
}

RowOrder sort_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t rows) {
  const Tensor sorted = at::argsort(numbers_in_range(expert_TK, first, experts), /*stable=*/true);   // all others come last
  return {sorted.narrow(0, 0, rows), inverse_of(sorted).clamp_max_(rows).view(expert_TK.sizes()), true, false};
}

RowOrder slots_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t slots) {
  const Tensor number_N = numbers_in_range(expert_TK, first, experts), sorted_N = at::argsort(number_N, /*stable=*/true);
  const Tensor count = occurrences(number_N, experts + 1), begin = count.cumsum(0) - count;
  const Tensor expert_N = number_N.index_select(0, sorted_N);
  const Tensor place_N = count_up_to(number_N.size(0), number_N) - begin.index_select(0, expert_N);
  const int64_t rows = experts * slots;
  const Tensor row_N = at::where(expert_N.lt(experts), expert_N * slots + place_N, rows);
  const Tensor choice = at::full({rows + 1}, number_N.size(0), number_N.options()).scatter_(0, row_N, sorted_N);
  return {choice.narrow(0, 0, rows), at::empty_like(row_N).scatter_(0, sorted_N, row_N).view(expert_TK.sizes()), false, false};
}

Tensor count_choices(const Tensor& expert_TK, int64_t experts, int64_t first) {
  return occurrences(numbers_in_range(expert_TK, first, experts), experts + 1).narrow(0, 0, experts);
}

Tensor spread_rows(const Tensor& x_TD, const RowOrder& order) {
  const int64_t choices = order.row_TK.size(1);
  Tensor x_RD;
  {
    const Unrecorded guard;
    const Tensor token_R = order.choice_R.div(choices, "floor");
    x_RD = (order.every_row ? x_TD : with_nothing(x_TD)).index_select(0, token_R);
  }
  return record(x_RD, {x_TD}, [order, choices](const std::vector<Tensor>& d) -> Gradients {
    const Tensor d_RD = order.every_choice ? d[0] : with_nothing(d[0]);
    const Tensor d_TKD = d_RD.index_select(0, order.row_TK.reshape({-1})).view({-1, choices, d_RD.size(1)});
    return {d_TKD.sum(1, false, at::kFloat).to(d_RD.scalar_type())};
  });
}

Tensor weigh_and_sum(const Tensor& y_RD, const Tensor& weight_TK, const RowOrder& order,
                     std::optional<at::ScalarType> dtype) {
  const int64_t choices = weight_TK.size(1), rows = y_RD.size(0), width = y_RD.size(1);
  const auto all_rows = [every = order.every_choice](const Tensor& y) { return every ? y : with_nothing(y); };
  const auto rows_of_choice = [](const Tensor& y, const RowOrder& o, int64_t k) {
    return y.index_select(0, o.row_TK.select(1, k)).to(at::kFloat);
  };
  Tensor y_TD;
  {
    const Unrecorded guard;
    const Tensor y = all_rows(y_RD);
    y_TD = at::zeros({weight_TK.size(0), width}, y_RD.options().dtype(at::kFloat));
    for (int64_t k = 0; k < choices; ++k) y_TD.addcmul_(rows_of_choice(y, order, k), weight_TK.narrow(1, k, 1));
    y_TD = y_TD.to(dtype.value_or(y_RD.scalar_type()));
  }
  auto backward = [y_RD = y_RD.detach(), weight_TK = weight_TK.detach(), order, choices, rows, all_rows,
                   rows_of_choice](const std::vector<Tensor>& d) -> Gradients {
    const Tensor d_TD = d[0].to(at::kFloat), y = all_rows(y_RD);
    Tensor d_weight = at::empty_like(weight_TK), d_y = order.every_row ? at::empty_like(y) : at::zeros_like(y);
    for (int64_t k = 0; k < choices; ++k) {
      d_weight.select(1, k).copy_((d_TD * rows_of_choice(y, order, k)).sum(1));
      d_y.index_copy_(0, order.row_TK.select(1, k), (d_TD * weight_TK.narrow(1, k, 1)).to(d_y.scalar_type()));
    }
    return {d_y.narrow(0, 0, rows), d_weight};
  };
  return record(y_TD, {y_RD, weight_TK}, backward);
}

Tensor permute_rows(const Tensor& x_RD, const Tensor& permutation_R) {
  Tensor y;
  {
    const Unrecorded guard;
    y = x_RD.index_select(0, permutation_R);
  }
  return record(y, {x_RD}, [permutation_R](const std::vector<Tensor>& d) -> Gradients {
    return {d[0].index_select(0, inverse_of(permutation_R))};
  });
}

}  // namespace upcycle
