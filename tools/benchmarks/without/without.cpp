// upcycle_without: `upcycle` with some ops in their plain form, for the table of what each technique brings:
//   WITHOUT=swiglu,attention upcycle_without train RUN.toml
// The linker leads the calls of these ops here (--wrap; CMakeLists.txt reads the symbols below): the program has no such switch. The names are
// Itanium's mangled ones, of which __real_ is the op itself; a signature that changes does not link any more. Says once on stderr what it replaces.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "base/postponed.hpp"
#include "ops/adamw.hpp"
#include "ops/attention.hpp"
#include "ops/cross_entropy.hpp"
#include "ops/cuda/grouped_gemm.hpp"
#include "ops/grouped_matmul.hpp"
#include "ops/linear.hpp"
#include "ops/permute.hpp"
#include "ops/qk_norm_rope.hpp"
#include "ops/rms_norm.hpp"
#include "ops/router_product.hpp"
#include "ops/routing.hpp"
#include "ops/sums_of_squares.hpp"
#include "ops/swiglu.hpp"

namespace upcycle {
namespace {

const std::vector<std::string> kTechniques = {"adamw", "attention", "cross_entropy", "grouped_matmul", "overwriting", "postponed", "qk_norm_rope",
                                              "rms_norm", "router", "rows", "shares", "sums_of_squares", "swiglu"};

bool listed(const std::string& technique) {
  const char* given = std::getenv("WITHOUT");
  std::istringstream names(given ? given : "");
  bool found = false;
  for (std::string name; std::getline(names, name, ',');) {
    found = found || name == technique;
    bool known = false;
    for (const std::string& one : kTechniques) known = known || one == name;
    if (known) continue;
    std::fprintf(stderr, "upcycle_without: WITHOUT names %s; there are:", name.c_str());
    for (const std::string& one : kTechniques) std::fprintf(stderr, " %s", one.c_str());
    std::fputs("\n", stderr);
    std::exit(2);
  }
  if (found) std::fprintf(stderr, "upcycle_without: without %s\n", technique.c_str());
  return found;
}

// Asked once, where the technique is first called for.
#define WITHOUT(technique)                             \
  ([] {                                                \
    static const bool without = listed(#technique);    \
    return without;                                    \
  }())

}  // namespace

// --- norms: a kernel each way, with the sum before them.
Tensor real_rms_norm(const Tensor&, Parameter&, double) asm("__real__ZN7upcycle8rms_normERKN2at6TensorERNS_9ParameterEd");
Tensor wrap_rms_norm(const Tensor&, Parameter&, double) asm("__wrap__ZN7upcycle8rms_normERKN2at6TensorERNS_9ParameterEd");
Tensor wrap_rms_norm(const Tensor& x, Parameter& weight, double eps) {
  return WITHOUT(rms_norm) ? rms_norm_written_out(x, {}, weight, eps).norm_D : real_rms_norm(x, weight, eps);
}
Normed real_beside(const Tensor&, Parameter&, double) asm("__real__ZN7upcycle15rms_norm_besideERKN2at6TensorERNS_9ParameterEd");
Normed wrap_beside(const Tensor&, Parameter&, double) asm("__wrap__ZN7upcycle15rms_norm_besideERKN2at6TensorERNS_9ParameterEd");
Normed wrap_beside(const Tensor& x, Parameter& weight, double eps) {
  return WITHOUT(rms_norm) ? rms_norm_written_out(x, {}, weight, eps) : real_beside(x, weight, eps);
}
Normed real_add(const Tensor&, const Tensor&, Parameter&, double) asm("__real__ZN7upcycle12add_rms_normERKN2at6TensorES3_RNS_9ParameterEd");
Normed wrap_add(const Tensor&, const Tensor&, Parameter&, double) asm("__wrap__ZN7upcycle12add_rms_normERKN2at6TensorES3_RNS_9ParameterEd");
Normed wrap_add(const Tensor& x, const Tensor& branch, Parameter& weight, double eps) {
  return WITHOUT(rms_norm) ? rms_norm_written_out(x, branch, weight, eps) : real_add(x, branch, weight, eps);
}

// --- attention: q and k normed and rotated in one kernel; cuDNN instead of flash.
Heads real_heads(const Tensor&, Parameter&, Parameter&, const HeadColumns&) asm("__real__ZN7upcycle12qk_norm_ropeERKN2at6TensorERNS_9ParameterES5_RKNS_11HeadColumnsE");
Heads wrap_heads(const Tensor&, Parameter&, Parameter&, const HeadColumns&) asm("__wrap__ZN7upcycle12qk_norm_ropeERKN2at6TensorERNS_9ParameterES5_RKNS_11HeadColumnsE");
Heads wrap_heads(const Tensor& qkv, Parameter& q_norm, Parameter& k_norm, const HeadColumns& columns) {
  return WITHOUT(qk_norm_rope) ? qk_norm_rope_written_out(qkv, q_norm, k_norm, columns) : real_heads(qkv, q_norm, k_norm, columns);
}
Attended real_attention(const Tensor&, const Tensor&, const Tensor&, const Segments&, AttentionKernel, const std::vector<Dense>&)
    asm("__real__ZN7upcycle9attentionERKN2at6TensorES3_S3_RKNS_8SegmentsENS_15AttentionKernelERKSt6vectorINS_5DenseESaIS9_EE");
Attended wrap_attention(const Tensor&, const Tensor&, const Tensor&, const Segments&, AttentionKernel, const std::vector<Dense>&)
    asm("__wrap__ZN7upcycle9attentionERKN2at6TensorES3_S3_RKNS_8SegmentsENS_15AttentionKernelERKSt6vectorINS_5DenseESaIS9_EE");
Attended wrap_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, AttentionKernel kernel,
                        const std::vector<Dense>& own) {
  return real_attention(q, k, v, segments, WITHOUT(attention) ? AttentionKernel::flash : kernel, own);
}

// --- the mixture: routing in one pass, rows by kernels, products that read their sizes on the device, SwiGLU with the weight.
Tensor real_router(const Tensor&, Parameter&) asm("__real__ZN7upcycle14router_productERKN2at6TensorERNS_9ParameterE");
Tensor wrap_router(const Tensor&, Parameter&) asm("__wrap__ZN7upcycle14router_productERKN2at6TensorERNS_9ParameterE");
Tensor wrap_router(const Tensor& x, Parameter& weight) { return WITHOUT(router) ? linear(x, weight) : real_router(x, weight); }
bool real_one_pass(const Tensor&) asm("__real__ZN7upcycle18routes_in_one_passERKN2at6TensorE");
bool wrap_one_pass(const Tensor&) asm("__wrap__ZN7upcycle18routes_in_one_passERKN2at6TensorE");
bool wrap_one_pass(const Tensor& logits) { return !WITHOUT(router) && real_one_pass(logits); }
RowOrder real_sort(const Tensor&, int64_t) asm("__real__ZN7upcycle14sort_by_expertERKN2at6TensorEl");
RowOrder wrap_sort(const Tensor&, int64_t) asm("__wrap__ZN7upcycle14sort_by_expertERKN2at6TensorEl");
RowOrder wrap_sort(const Tensor& expert, int64_t experts) {
  return WITHOUT(rows) ? sort_by_expert_written_out(expert, 0, experts, expert.numel()) : real_sort(expert, experts);
}
Tensor real_spread(const Tensor&, const RowOrder&) asm("__real__ZN7upcycle11spread_rowsERKN2at6TensorERKNS_8RowOrderE");
Tensor wrap_spread(const Tensor&, const RowOrder&) asm("__wrap__ZN7upcycle11spread_rowsERKN2at6TensorERKNS_8RowOrderE");
Tensor wrap_spread(const Tensor& x, const RowOrder& order) { return WITHOUT(rows) ? spread_rows_written_out(x, order) : real_spread(x, order); }
Tensor real_sum(const Tensor&, const RowOrder&, std::optional<at::ScalarType>)
    asm("__real__ZN7upcycle8sum_rowsERKN2at6TensorERKNS_8RowOrderESt8optionalIN3c1010ScalarTypeEE");
Tensor wrap_sum(const Tensor&, const RowOrder&, std::optional<at::ScalarType>)
    asm("__wrap__ZN7upcycle8sum_rowsERKN2at6TensorERKNS_8RowOrderESt8optionalIN3c1010ScalarTypeEE");
Tensor wrap_sum(const Tensor& y, const RowOrder& order, std::optional<at::ScalarType> dtype) {
  return WITHOUT(rows) ? sum_rows_written_out(y, order, dtype) : real_sum(y, order, dtype);
}
Tensor real_add(const Tensor&, const Tensor&, const RowOrder&) asm("__real__ZN7upcycle8add_rowsERKN2at6TensorES3_RKNS_8RowOrderE");
Tensor wrap_add(const Tensor&, const Tensor&, const RowOrder&) asm("__wrap__ZN7upcycle8add_rowsERKN2at6TensorES3_RKNS_8RowOrderE");
Tensor wrap_add(const Tensor& onto, const Tensor& y, const RowOrder& order) {
  return WITHOUT(rows) ? add_rows_written_out(onto, y, order) : real_add(onto, y, order);
}
Tensor real_grouped(const Tensor&, Parameter&, const Tensor&, GroupedKernels) asm("__real__ZN7upcycle14grouped_matmulERKN2at6TensorERNS_9ParameterES3_NS_14GroupedKernelsE");
Tensor wrap_grouped(const Tensor&, Parameter&, const Tensor&, GroupedKernels) asm("__wrap__ZN7upcycle14grouped_matmulERKN2at6TensorERNS_9ParameterES3_NS_14GroupedKernelsE");
Tensor wrap_grouped(const Tensor& x, Parameter& weight, const Tensor& end, GroupedKernels kernels) {
  const bool aten = WITHOUT(grouped_matmul) && x.is_cuda();
  return real_grouped(x, weight, end, aten ? GroupedKernels{GroupedKernel::aten, GroupedKernel::aten, GroupedKernel::aten} : kernels);
}
Tensor real_swiglu(const Tensor&, const Tensor&) asm("__real__ZN7upcycle6swigluERKN2at6TensorES3_");
Tensor wrap_swiglu(const Tensor&, const Tensor&) asm("__wrap__ZN7upcycle6swigluERKN2at6TensorES3_");
Tensor wrap_swiglu(const Tensor& gate_up, const Tensor& weight) {
  return WITHOUT(swiglu) ? swiglu_written_out(gate_up, weight) : real_swiglu(gate_up, weight);
}

// --- between ranks (WITHOUT=postponed,shares tools/bench scaling --upcycle .../upcycle_without): weight gradients that wait for an exchange;
// grouped products in many small shares.
void real_grouped_gemm(cuda::GroupedProduct, cuda::GroupedTile, const cuda::GroupedGemm&)
    asm("__real__ZN7upcycle4cuda12grouped_gemmENS0_14GroupedProductENS0_11GroupedTileERKNS0_11GroupedGemmE");
void wrap_grouped_gemm(cuda::GroupedProduct, cuda::GroupedTile, const cuda::GroupedGemm&)
    asm("__wrap__ZN7upcycle4cuda12grouped_gemmENS0_14GroupedProductENS0_11GroupedTileERKNS0_11GroupedGemmE");
void wrap_grouped_gemm(cuda::GroupedProduct product, cuda::GroupedTile tile, const cuda::GroupedGemm& g) {
  cuda::GroupedGemm mine = g;
  if (WITHOUT(shares)) mine.rounds = 1;
  real_grouped_gemm(product, tile, mine);
}
using WeightGradient = std::function<void()>;
using InputGradient = std::function<Tensor()>;
Tensor real_backward(WeightGradient, const InputGradient&) asm("__real__ZN7upcycle9Postponed16product_backwardESt8functionIFvvEERKS1_IFN2at6TensorEvEE");
Tensor wrap_backward(WeightGradient, const InputGradient&) asm("__wrap__ZN7upcycle9Postponed16product_backwardESt8functionIFvvEERKS1_IFN2at6TensorEvEE");
Tensor wrap_backward(WeightGradient weight, const InputGradient& input) {
  if (!WITHOUT(postponed)) return real_backward(std::move(weight), input);
  weight();
  return input();
}

// --- the loss and the optimizer.
Tensor real_loss(Tensor, const Tensor&, const Tensor&) asm("__real__ZN7upcycle13cross_entropyEN2at6TensorERKS1_S3_");
Tensor wrap_loss(Tensor, const Tensor&, const Tensor&) asm("__wrap__ZN7upcycle13cross_entropyEN2at6TensorERKS1_S3_");
Tensor wrap_loss(Tensor logits, const Tensor& labels, const Tensor& weight) {
  if (!WITHOUT(cross_entropy)) return real_loss(std::move(logits), labels, weight);
  const SoftmaxSums sums = softmax_sums_written_out(logits, labels);
  const Tensor losses = weighted_losses(sums, weight);
  cross_entropy_gradient_written_out(std::move(logits), labels, weight, sums);
  return losses;
}
Tensor real_squares(const std::vector<Tensor>&, const std::vector<double>&)
    asm("__real__ZN7upcycle15sums_of_squaresERKSt6vectorIN2at6TensorESaIS2_EERKS0_IdSaIdEE");
Tensor wrap_squares(const std::vector<Tensor>&, const std::vector<double>&)
    asm("__wrap__ZN7upcycle15sums_of_squaresERKSt6vectorIN2at6TensorESaIS2_EERKS0_IdSaIdEE");
Tensor wrap_squares(const std::vector<Tensor>& all, const std::vector<double>& shares) {
  return WITHOUT(sums_of_squares) ? sums_of_squares_written_out(all, shares) : real_squares(all, shares);
}
void real_step(const AdamWBuffer*, const AdamW&, const Tensor&, const Tensor&, const Tensor&)
    asm("__real__ZNK7upcycle11AdamWBuffer4stepERKNS_5AdamWERKN2at6TensorES7_S7_");
void wrap_step(const AdamWBuffer*, const AdamW&, const Tensor&, const Tensor&, const Tensor&)
    asm("__wrap__ZNK7upcycle11AdamWBuffer4stepERKNS_5AdamWERKN2at6TensorES7_S7_");
void wrap_step(const AdamWBuffer* buffer, const AdamW& settings, const Tensor& step, const Tensor& divisor, const Tensor& skip) {
  WITHOUT(adamw) ? buffer->step_written_out(settings, step, divisor, skip) : real_step(buffer, settings, step, divisor, skip);
}
// Gradients of matrices: zeroed, and added to.
bool real_overwrites(Parameter*) asm("__real__ZN7upcycle9Parameter10overwritesEv");
bool wrap_overwrites(Parameter*) asm("__wrap__ZN7upcycle9Parameter10overwritesEv");
bool wrap_overwrites(Parameter* parameter) {
  if (!WITHOUT(overwriting)) return real_overwrites(parameter);
  parameter->sums();
  return false;
}

}  // namespace upcycle
