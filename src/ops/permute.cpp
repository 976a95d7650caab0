#include "ops/permute.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

Tensor inverse_of(const Tensor& permutation) {
  Tensor back = at::empty_like(permutation);
  return back.scatter_(0, permutation, at::arange(permutation.size(0), permutation.options()));
}

}  // namespace

RowOrder sort_by_expert(const Tensor& expert_TK) {
  const Tensor choice_R = at::argsort(expert_TK.reshape({-1}), /*stable=*/true);
  return {choice_R, inverse_of(choice_R).view(expert_TK.sizes())};
}

Tensor spread_rows(const Tensor& x_TD, const RowOrder& order) {
  const int64_t choices = order.row_TK.size(1);
  Tensor x_RD;
  {
    const Unrecorded guard;
    x_RD = x_TD.index_select(0, order.choice_R.div(choices, "floor"));
  }
  return record(x_RD, {x_TD}, [order, choices](const std::vector<Tensor>& d) -> Gradients {
    const Tensor d_TKD = d[0].index_select(0, order.row_TK.reshape({-1})).view({-1, choices, d[0].size(1)});
    return {d_TKD.sum(1, false, at::kFloat).to(d[0].scalar_type())};
  });
}

Tensor weigh_and_sum(const Tensor& y_RD, const Tensor& weight_TK, const RowOrder& order) {
  const int64_t choices = weight_TK.size(1), width = y_RD.size(1);
  const auto rows_of_choice = [width](const Tensor& y, const RowOrder& o, int64_t k) {
    return y.index_select(0, o.row_TK.select(1, k)).to(at::kFloat);
  };
  Tensor y_TD;
  {
    const Unrecorded guard;
    y_TD = at::zeros({weight_TK.size(0), width}, y_RD.options().dtype(at::kFloat));
    for (int64_t k = 0; k < choices; ++k) y_TD.addcmul_(rows_of_choice(y_RD, order, k), weight_TK.narrow(1, k, 1));
    y_TD = y_TD.to(y_RD.scalar_type());
  }
  auto backward = [y_RD = y_RD.detach(), weight_TK = weight_TK.detach(), order, choices,
                   rows_of_choice](const std::vector<Tensor>& d) -> Gradients {
    const Tensor d_TD = d[0].to(at::kFloat);
    Tensor d_weight = at::empty_like(weight_TK), d_y = at::empty_like(y_RD);
    for (int64_t k = 0; k < choices; ++k) {
      d_weight.select(1, k).copy_((d_TD * rows_of_choice(y_RD, order, k)).sum(1));
      d_y.index_copy_(0, order.row_TK.select(1, k), (d_TD * weight_TK.narrow(1, k, 1)).to(d_y.scalar_type()));
    }
    return {d_y, d_weight};
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
