#pragma once
#include "ops/parameter.hpp"

// Shapes: R rows sorted by expert, E experts, I inputs, O outputs. `end_E` is int32 [E] on the rows' device: expert e owns rows
// end[e-1] .. end[e]; end[E-1] == R.
namespace upcycle {

/// What makes a grouped product.
enum class GroupedKernel {
  automatic,    ///< the fastest of those that take the shape
  one_by_one,   ///< a product an expert: any device, dtype and width; the host waits for `end_E`
  aten,         ///< ATen's grouped kernel: CUDA, bf16, I and O multiples of 8
  wide,         ///< ours with tiles of 128 x 256 (cuda/grouped_gemm.hpp): the same, on Hopper
  square        ///< ours with tiles of 128 x 128; weight gradients only
};
struct GroupedKernels {
  GroupedKernel forward = GroupedKernel::automatic, input_gradient = GroupedKernel::automatic, weight_gradient = GroupedKernel::automatic;
  /// Backward has company on the GPU: what travels between ranks takes processors away. Then ours make all of its products, in many small
  /// shares (GroupedGemm::rounds). The same bits.
  bool beside_transfers = false;
};

/// y_RO: rows of expert e times weight[e]^T. `x` [R, I]; `weight.value` [E, O, I], same dtype. Backward adds into weight.main_grad.
/// CUDA, bf16, I and O multiples of 8: a grouped kernel that reads `end_E` on the device, no host synchronisation. Else one product per
/// expert, for which the host waits for `end_E`; for bf16 on a GPU that is logged once a shape. `kernels` other than automatic are for
/// tests and benchmarks; std::logic_error where one does not take the shape.
Tensor grouped_matmul(const Tensor& x_RI, Parameter& weight_EOI, const Tensor& end_E, GroupedKernels kernels = {});

/// Its three products, each by itself; nothing is recorded.
Tensor grouped_product(const Tensor& x_RI, const Tensor& weight_EOI, const Tensor& end_E, GroupedKernel kernel = {});
Tensor grouped_input_gradient(const Tensor& dy_RO, const Tensor& weight_EOI, const Tensor& end_E, GroupedKernel kernel = {},
                              bool beside_transfers = false);
/// main_grad [E, O, I] (fp32) += each expert's dy^T x. Ours adds in fp32 without a temporary; ATen's makes the products of this micro-batch
/// in bf16 first. An expert without rows keeps its gradient. `overwrite`: main_grad = those products, zeros without rows, whatever was there;
/// ours then return partial sums (fp64) of main_grad's squares, made before it leaves the registers. Undefined otherwise.
Tensor add_grouped_weight_gradient(Tensor main_grad_EOI, const Tensor& dy_RO, const Tensor& x_RI, const Tensor& end_E,
                                   GroupedKernel kernel = {}, bool overwrite = false, bool beside_transfers = false);

}  // namespace upcycle
