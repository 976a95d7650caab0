#include "ops/grouped_matmul.hpp"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "base/postponed.hpp"
#include "device/stream.hpp"
#include "ops/cuda/grouped_gemm.hpp"
#include "ops/linear.hpp"

namespace upcycle {
namespace {

using cuda::GroupedProduct;
using enum GroupedKernel;

void tell_once(int64_t out, int64_t in) {
  static std::mutex mutex;
  static std::set<std::pair<int64_t, int64_t>> told;
  const std::lock_guard lock(mutex);
  if (!told.emplace(out, in).second) return;
  log::warning(text("experts of ", out, " x ", in, " are multiplied one by one, and the host waits for each layer's routing: ",
                    "the grouped kernels take widths that are multiples of 8"));
}

bool on_borders_of_16_bytes(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

/// Rows of an expert are K of its weight gradient: with few of them the result is what takes time, and square tiles write one while they
/// multiply the next. Else wide ones read a third less through the L2 cache, unless half of the last of few columns would be empty.
GroupedKernel fastest(GroupedProduct product, int64_t rows_of_expert, int64_t in, bool beside_transfers) {
  if (product != GroupedProduct::weight_gradient) return beside_transfers ? wide : aten;
  const bool half_empty = in < 1024 && in % 256 > 0 && in % 256 <= 128;
  return rows_of_expert < 1024 || half_empty ? square : wide;
}

/// `operands`: all that is read and written; `weight`: [E, O, I], or its gradient.
GroupedKernel choose(GroupedProduct product, const Tensor& rows, const Tensor& weight, std::initializer_list<Tensor> operands,
                     GroupedKernel wish, bool beside_transfers = false) {
  if (wish == one_by_one) return one_by_one;
  const int64_t out = weight.size(1), in = weight.size(2);
  if (!rows.is_cuda() || rows.size(0) == 0 || rows.scalar_type() != at::kBFloat16 || out % 8 != 0 || in % 8 != 0) {
    if (wish != automatic) throw std::logic_error("a grouped kernel was asked for that does not take these matrices");
    if (rows.is_cuda() && rows.size(0) > 0 && rows.scalar_type() == at::kBFloat16) tell_once(out, in);
    return one_by_one;
  }
  bool ours = cuda::has_grouped_gemm();
  for (const Tensor& x : operands) ours = ours && x.is_contiguous() && on_borders_of_16_bytes(x);
  if (wish == automatic) {
    const GroupedKernel kernel = fastest(product, rows.size(0) / weight.size(0), in, beside_transfers);
    return ours || kernel == aten ? kernel : aten;
  }
  if (wish != aten && (!ours || (wish == square && product != GroupedProduct::weight_gradient))) {
    throw std::logic_error("a grouped kernel was asked for that does not take these matrices, or not on this GPU");
  }
  return wish;
}

/// Blocks per processor. Measured beside NCCL on 2 H100s, ZeRO-1: 1 reaches 93 % of perfect, 2: 94, 4: 96, 8: 97.
int rounds(bool beside_transfers) { return beside_transfers ? 8 : 1; }

cuda::GroupedTile tile_of(GroupedKernel kernel) { return kernel == wide ? cuda::GroupedTile::wide : cuda::GroupedTile::square; }

void multiply_ours(GroupedProduct product, GroupedKernel kernel, const Tensor& left, const Tensor& right, Tensor result,
                   const Tensor& end_E, int64_t out, int64_t in, int rounds = 1, double* squares = nullptr) {
  const int experts = static_cast<int>(end_E.size(0));
  const Tensor workspace = at::empty({cuda::grouped_gemm_workspace(experts, rounds)}, left.options().dtype(at::kByte));
  cuda::grouped_gemm(product, tile_of(kernel),
                     {.left = left.const_data_ptr(),
                      .right = right.const_data_ptr(),
                      .result = result.mutable_data_ptr(),
                      .squares = squares,
                      .end = end_E.const_data_ptr<int32_t>(),
                      .experts = experts,
                      .in = in,
                      .out = out,
                      .rounds = rounds,
                      .workspace = workspace.mutable_data_ptr(),
                      .stream = device::current_stream(left.device())});
}

void for_each_expert(const Tensor& end_E, const std::function<void(int64_t expert, int64_t begin, int64_t rows)>& visit) {
  const Tensor ends = end_E.cpu();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  for (int64_t expert = 0, begin = 0; expert < ends.size(0); begin = end[expert++]) visit(expert, begin, end[expert] - begin);
}

// [R, I] x [E, I, O] -> [R, O]
Tensor multiply_one_by_one(const Tensor& x, const Tensor& matrices, const Tensor& end_E) {
  Tensor y = at::empty({x.size(0), matrices.size(2)}, x.options());
  for_each_expert(end_E, [&](int64_t expert, int64_t begin, int64_t rows) {
    if (rows > 0) matrix_product_into(y.narrow(0, begin, rows), x.narrow(0, begin, rows), matrices[expert]);
  });
  return y;
}

}  // namespace

Tensor grouped_product(const Tensor& x_RI, const Tensor& weight_EOI, const Tensor& end_E, GroupedKernel wish) {
  const GroupedKernel kernel = choose(GroupedProduct::forward, x_RI, weight_EOI, {x_RI, weight_EOI}, wish);
  if (kernel == one_by_one) return multiply_one_by_one(x_RI, weight_EOI.transpose(1, 2), end_E);
  if (kernel == aten) return at::_grouped_mm(x_RI, weight_EOI.transpose(1, 2), end_E);
  const Tensor y_RO = at::empty({x_RI.size(0), weight_EOI.size(1)}, x_RI.options());
  multiply_ours(GroupedProduct::forward, kernel, x_RI, weight_EOI, y_RO, end_E, weight_EOI.size(1), weight_EOI.size(2));
  return y_RO;
}

Tensor grouped_input_gradient(const Tensor& dy_RO, const Tensor& weight_EOI, const Tensor& end_E, GroupedKernel wish, bool beside_transfers) {
  const GroupedKernel kernel = choose(GroupedProduct::input_gradient, dy_RO, weight_EOI, {dy_RO, weight_EOI}, wish, beside_transfers);
  if (kernel == one_by_one) return multiply_one_by_one(dy_RO, weight_EOI, end_E);
  if (kernel == aten) return at::_grouped_mm(dy_RO, weight_EOI, end_E);
  const Tensor dx_RI = at::empty({dy_RO.size(0), weight_EOI.size(2)}, dy_RO.options());
  multiply_ours(GroupedProduct::input_gradient, kernel, dy_RO, weight_EOI, dx_RI, end_E, weight_EOI.size(1), weight_EOI.size(2),
                rounds(beside_transfers));
  return dx_RI;
}

Tensor add_grouped_weight_gradient(Tensor main_grad_EOI, const Tensor& dy_RO, const Tensor& x_RI, const Tensor& end_E, GroupedKernel wish,
                                   bool overwrite, bool beside_transfers) {
  const int64_t experts = main_grad_EOI.size(0), out = main_grad_EOI.size(1), in = main_grad_EOI.size(2);
  const GroupedKernel kernel = choose(GroupedProduct::weight_gradient, dy_RO, main_grad_EOI, {dy_RO, x_RI, main_grad_EOI}, wish);
  if (kernel == one_by_one) {
    for_each_expert(end_E, [&](int64_t expert, int64_t begin, int64_t rows) {
      add_weight_gradient(main_grad_EOI[expert], dy_RO.narrow(0, begin, rows), x_RI.narrow(0, begin, rows), overwrite);
    });
  } else if (kernel == aten) {
    const Tensor products = at::_grouped_mm(dy_RO.t(), x_RI, end_E);   // in bf16; the sum over micro-batches is fp32
    overwrite ? main_grad_EOI.copy_(products) : main_grad_EOI.add_(products);
  } else if (!overwrite) {
    multiply_ours(GroupedProduct::added_weight_gradient, kernel, dy_RO, x_RI, main_grad_EOI, end_E, out, in, rounds(beside_transfers));
  } else {
    const Tensor squares = at::empty({experts * cuda::square_sums_of_expert(tile_of(kernel), out, in)}, dy_RO.options().dtype(at::kDouble));
    multiply_ours(GroupedProduct::weight_gradient, kernel, dy_RO, x_RI, main_grad_EOI, end_E, out, in, rounds(beside_transfers),
                  squares.mutable_data_ptr<double>());
    return squares;
  }
  return {};
}

Tensor grouped_matmul(const Tensor& x, Parameter& weight, const Tensor& end_E, GroupedKernels kernels) {
  Tensor y;
  {
    const Unrecorded guard;
    y = grouped_product(x, weight.arrived(), end_E, kernels.forward);
  }
  return record(y, {x}, [x = x.detach(), end_E, kernels, &weight](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor dy_RO = dy[0].contiguous();
    const auto weight_gradient = [dy_RO, x, end_E, kernels, &weight] {
      const bool overwrite = weight.overwrites();
      weight.squares = add_grouped_weight_gradient(weight.main_grad, dy_RO, x, end_E, kernels.weight_gradient, overwrite, kernels.beside_transfers);
      weight.ready();
    };
    return {Postponed::product_backward(weight_gradient, [&] {
      return grouped_input_gradient(dy_RO, weight.value, end_E, kernels.input_gradient, kernels.beside_transfers);
    })};
  });
}

}  // namespace upcycle
