#include "ops/permute.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/permute.hpp"

namespace upcycle {
namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }

/// The number of a row fits 31 bits there.
bool kernels_take(const Tensor& x, int64_t rows) {
  return x.is_cuda() && (is_bf16(x) || x.scalar_type() == at::kFloat) && rows < int64_t{1} << 31;
}
bool kernels_take(const Tensor& x, const RowOrder& order) { return kernels_take(x, order.choice_R.size(0)); }

/// [R, D]: row[t, k] gets x[t]; rows whose `choice_R` says that they have none get zeros. `choice_R` undefined: all have one.
Tensor copies_by_kernel(const Tensor& of, const Tensor& row_TK, const Tensor& choice_R, int64_t rows) {
  const Tensor x = of.contiguous(), row = row_TK.contiguous(), y = at::empty({rows, of.size(1)}, of.options());
  cuda::copy_rows({x.const_data_ptr(), row.const_data_ptr<int64_t>(), choice_R.defined() ? choice_R.const_data_ptr<int64_t>() : nullptr,
                   y.mutable_data_ptr(), row.size(0), row.size(1), rows, x.size(1) * x.element_size(), x.element_size()},
                  device::current_stream(of.device()));
  return y;
}

/// [T, D]: the sums over the rows row[t, 0], row[t, 1], .., and of `onto`, of that dtype, unless it is undefined.
Tensor sums_by_kernel(const Tensor& of, const Tensor& row_TK, at::ScalarType dtype, const Tensor& onto = {}) {
  const Tensor y = of.contiguous(), row = row_TK.contiguous();
  const Tensor x = at::empty({row.size(0), y.size(1)}, y.options().dtype(dtype == y.scalar_type() ? dtype : at::kFloat));
  const Tensor other = onto.defined() ? onto.to(x.scalar_type()).contiguous() : onto;
  cuda::sum_rows({y.const_data_ptr(), row.const_data_ptr<int64_t>(), other.defined() ? other.const_data_ptr() : nullptr, x.mutable_data_ptr(),
                  row.size(0), row.size(1), y.size(0), y.size(1), is_bf16(y), is_bf16(x)},
                 device::current_stream(of.device()));
  return x.to(dtype);
}

/// With a last row of zeros, which the numbers T*K and R of a RowOrder point to.
Tensor with_nothing(const Tensor& x_RD) { return at::cat({x_RD, at::zeros({1, x_RD.size(1)}, x_RD.options())}, 0); }

Tensor copies(const Tensor& x_TD, const RowOrder& order, bool kernel) {
  if (kernel) return copies_by_kernel(x_TD, order.row_TK, order.every_row ? Tensor() : order.choice_R, order.choice_R.size(0));
  const Tensor token_R = order.choice_R.div(order.row_TK.size(1), "floor");
  return (order.every_row ? x_TD : with_nothing(x_TD)).index_select(0, token_R);
}

Tensor sums(const Tensor& y_RD, const RowOrder& order, at::ScalarType dtype, bool kernel, const Tensor& onto_TD = {}) {
  if (kernel) return sums_by_kernel(y_RD, order.row_TK, dtype, onto_TD);
  const Tensor y = order.every_choice ? y_RD : with_nothing(y_RD);
  const auto rows_of_choice = [&](int64_t k) { return y.index_select(0, order.row_TK.select(1, k)); };
  const Tensor sum_TD = rows_of_choice(0).to(at::kFloat);
  for (int64_t k = 1; k < order.row_TK.size(1); ++k) sum_TD.add_(rows_of_choice(k));
  if (onto_TD.defined()) sum_TD.add_(onto_TD);
  return sum_TD.to(dtype);
}

Tensor spread(const Tensor& x_TD, const RowOrder& order, bool kernel) {
  Tensor x_RD;
  {
    const Unrecorded guard;
    x_RD = copies(x_TD, order, kernel);
  }
  return record(x_RD, {x_TD}, [order, kernel, dtype = x_TD.scalar_type()](const std::vector<Tensor>& d) -> Gradients {
    return {sums(d[0], order, dtype, kernel)};
  });
}

Tensor sum(const Tensor& y_RD, const RowOrder& order, std::optional<at::ScalarType> dtype, bool kernel) {
  Tensor y_TD;
  {
    const Unrecorded guard;
    y_TD = sums(y_RD, order, dtype.value_or(y_RD.scalar_type()), kernel);
  }
  return record(y_TD, {y_RD}, [order, kernel, dtype = y_RD.scalar_type()](const std::vector<Tensor>& d) -> Gradients {
    return {copies(d[0].to(dtype), order, kernel)};
  });
}

Tensor sum_onto(const Tensor& onto_TD, const Tensor& y_RD, const RowOrder& order, bool kernel) {
  Tensor y_TD;
  {
    const Unrecorded guard;
    y_TD = sums(y_RD, order, onto_TD.scalar_type(), kernel, onto_TD);
  }
  return record(y_TD, {onto_TD, y_RD}, [order, kernel, dtype = y_RD.scalar_type()](const std::vector<Tensor>& d) -> Gradients {
    return {d[0], copies(d[0].to(dtype), order, kernel)};
  });
}

}  // namespace

Tensor spread_rows(const Tensor& x_TD, const RowOrder& order) { return spread(x_TD, order, kernels_take(x_TD, order)); }
Tensor spread_rows_written_out(const Tensor& x_TD, const RowOrder& order) { return spread(x_TD, order, false); }

Tensor sum_rows(const Tensor& y_RD, const RowOrder& order, std::optional<at::ScalarType> dtype) {
  return sum(y_RD, order, dtype, kernels_take(y_RD, order));
}
Tensor sum_rows_written_out(const Tensor& y_RD, const RowOrder& order, std::optional<at::ScalarType> dtype) {
  return sum(y_RD, order, dtype, false);
}

Tensor add_rows(const Tensor& onto_TD, const Tensor& y_RD, const RowOrder& order) {
  return sum_onto(onto_TD, y_RD, order, kernels_take(y_RD, order));
}
Tensor add_rows_written_out(const Tensor& onto_TD, const Tensor& y_RD, const RowOrder& order) {
  return sum_onto(onto_TD, y_RD, order, false);
}

// As sums of one row each, and copies to one row each.
Tensor permute_rows(const Tensor& x_RD, const Tensor& permutation_R) {
  const bool kernel = kernels_take(x_RD, x_RD.size(0));
  Tensor y;
  {
    const Unrecorded guard;
    y = kernel ? sums_by_kernel(x_RD, permutation_R.unsqueeze(1), x_RD.scalar_type()) : x_RD.index_select(0, permutation_R);
  }
  return record(y, {x_RD}, [permutation_R, kernel](const std::vector<Tensor>& d) -> Gradients {
    if (kernel) return {copies_by_kernel(d[0], permutation_R.unsqueeze(1), {}, d[0].size(0))};
    return {d[0].index_select(0, inverse_of(permutation_R))};
  });
}

}  // namespace upcycle
