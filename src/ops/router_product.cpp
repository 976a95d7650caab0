#include "ops/router_product.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/router_product.hpp"
#include "ops/linear.hpp"

namespace upcycle {
namespace {

bool on_units(const Tensor& x, const Parameter& weight) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && weight.value.scalar_type() == at::kFloat && x.size(-1) % 8 == 0 && x.size(-1) > 0;
}

/// Kernels read 16 bytes at once; a view may begin anywhere.
Tensor rows_of(const Tensor& x) {
  const Tensor x_TD = x.reshape({-1, x.size(-1)}).contiguous();
  return reinterpret_cast<uintptr_t>(x_TD.const_data_ptr()) % 16 == 0 ? x_TD : x_TD.clone();
}

Tensor multiply(const Tensor& x_TD, const Tensor& weight_ED) {
  const int64_t rows = x_TD.size(0), width = x_TD.size(1), outputs = weight_ED.size(0), padded = cuda::padded_outputs(outputs);
  CUstream_st* const stream = device::current_stream(x_TD.device());
  const Tensor terms_3FD = at::empty({3, padded, width}, x_TD.options()), y_TE = at::empty({rows, outputs}, weight_ED.options());
  cuda::split_into_terms({.x_RC = weight_ED.const_data_ptr<float>(),
                          .rows = outputs,
                          .columns = width,
                          .padded_rows = padded,
                          .padded_columns = width,
                          .out = terms_3FD.mutable_data_ptr(),
                          .slot_stride = padded * width,
                          .row_stride = width,
                          .slots = 3,
                          .term = {0, 1, 2}},
                         stream);
  cuda::router_product({.x_TD = x_TD.const_data_ptr(),
                        .terms = terms_3FD.const_data_ptr(),
                        .slot_stride = padded * width,
                        .row_stride = width,
                        .out = y_TE.mutable_data_ptr<float>(),
                        .rows = rows,
                        .width = width,
                        .outputs = outputs,
                        .splits = 1},
                       stream);
  return y_TE;
}

// dx = dy W as one product of bf16: of the nine products of a term of dy and one of W the six that are not below 2^-24 of the whole. The
// terms of dy stand side by side in a row, those of W one below the other. Three would do for a rounding to bf16, were it not for rows of
// W that are nearly alike: their gradients sum to zero, and what is left of the product is small.
constexpr int kProducts = 6;

/// [T, 6F]; the first three blocks of columns are the three terms.
Tensor terms_of_gradient(const Tensor& dy_TE, const at::TensorOptions& bf16) {
  const int64_t rows = dy_TE.size(0), outputs = dy_TE.size(1), padded = cuda::padded_outputs(outputs);
  const Tensor terms_TF = at::empty({rows, kProducts * padded}, bf16);
  cuda::split_into_terms({.x_RC = dy_TE.const_data_ptr<float>(),
                          .rows = rows,
                          .columns = outputs,
                          .padded_rows = rows,
                          .padded_columns = padded,
                          .out = terms_TF.mutable_data_ptr(),
                          .slot_stride = padded,
                          .row_stride = kProducts * padded,
                          .slots = kProducts,
                          .term = {0, 1, 2, 0, 1, 0}},
                         device::current_stream(dy_TE.device()));
  return terms_TF;
}

Tensor gradient_of_rows(const Tensor& terms_TF, const Tensor& weight_ED) {
  const int64_t outputs = weight_ED.size(0), width = weight_ED.size(1), padded = terms_TF.size(1) / kProducts;
  const Tensor terms_FD = at::empty({kProducts * padded, width}, terms_TF.options());
  cuda::split_into_terms({.x_RC = weight_ED.const_data_ptr<float>(),
                          .rows = outputs,
                          .columns = width,
                          .padded_rows = padded,
                          .padded_columns = width,
                          .out = terms_FD.mutable_data_ptr(),
                          .slot_stride = padded * width,
                          .row_stride = width,
                          .slots = kProducts,
                          .term = {0, 0, 0, 1, 1, 2}},
                         device::current_stream(weight_ED.device()));
  return at::mm(terms_TF, terms_FD);
}

void add_gradient_of_weight(const Tensor& main_grad_ED, const Tensor& terms_TF, const Tensor& x_TD) {
  const int64_t rows = x_TD.size(0), width = x_TD.size(1), outputs = main_grad_ED.size(0), padded = terms_TF.size(1) / kProducts;
  const int64_t splits = cuda::row_splits(rows, width, outputs);
  CUstream_st* const stream = device::current_stream(x_TD.device());
  const Tensor partial_SED = at::empty({splits, outputs, width}, main_grad_ED.options());
  cuda::router_weight_gradient({.x_TD = x_TD.const_data_ptr(),
                                .terms = terms_TF.const_data_ptr(),
                                .slot_stride = padded,
                                .row_stride = kProducts * padded,
                                .out = partial_SED.mutable_data_ptr<float>(),
                                .rows = rows,
                                .width = width,
                                .outputs = outputs,
                                .splits = splits},
                               stream);
  const bool in_place = main_grad_ED.is_contiguous();
  const Tensor sum_ED = in_place ? main_grad_ED : at::zeros_like(main_grad_ED, at::MemoryFormat::Contiguous);
  cuda::add_partial_sums(sum_ED.mutable_data_ptr<float>(), partial_SED.const_data_ptr<float>(), outputs * width, splits, stream);
  if (!in_place) main_grad_ED.add_(sum_ED);
}

}  // namespace

Tensor router_product(const Tensor& x, Parameter& weight) {
  if (!on_units(x, weight)) return linear(x, weight);
  Tensor x_TD, y;
  {
    const Unrecorded guard;
    x_TD = rows_of(x);
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() = weight.value.size(0);
    y = multiply(x_TD, weight.arrived().contiguous()).view(sizes);
  }
  return record(y, {x}, [x_TD = x_TD.detach(), sizes = x.sizes().vec(), &weight](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor terms_TF = terms_of_gradient(dy[0].reshape({-1, dy[0].size(-1)}).contiguous(), x_TD.options());
    add_gradient_of_weight(weight.sums(), terms_TF, x_TD);
    weight.ready();
    return {gradient_of_rows(terms_TF, weight.value.contiguous()).view(sizes)};
  });
}

}  // namespace upcycle
