// In a build without CUDA: every launch, so that the ops are the same objects in both builds. No tensor is on a GPU there.
#include <stdexcept>

#include "ops/cuda/adamw.hpp"
#include "ops/cuda/attention_parts.hpp"
#include "ops/cuda/cross_entropy.hpp"
#include "ops/cuda/embedding.hpp"
#include "ops/cuda/grouped_gemm.hpp"
#include "ops/cuda/permute.hpp"
#include "ops/cuda/qk_norm_rope.hpp"
#include "ops/cuda/rms_norm.hpp"
#include "ops/cuda/router_product.hpp"
#include "ops/cuda/routing.hpp"
#include "ops/cuda/sort.hpp"
#include "ops/cuda/sum_of_squares.hpp"
#include "ops/cuda/swiglu.hpp"

namespace upcycle::cuda {
namespace {

[[noreturn]] [[maybe_unused]] void absent() { throw std::logic_error("a kernel was asked for in a build without CUDA"); }

}  // namespace

void adamw(const AdamW&, CUstream_st*) { absent(); }
void merge_parts(const PartsMerge&, CUstream_st*) { absent(); }
void sum_parts(const PartsSum&, CUstream_st*) { absent(); }
void softmax_sums(const CrossEntropy&, CUstream_st*) { absent(); }
void cross_entropy_gradient(const CrossEntropy&, CUstream_st*) { absent(); }
void cross_entropy(const CrossEntropy&, CUstream_st*) { absent(); }
void add_embedding_gradient(const EmbeddingGradient&, CUstream_st*) { absent(); }
bool has_grouped_gemm() { return false; }
int64_t grouped_gemm_workspace(int, int) { absent(); }
int64_t square_sums_of_expert(GroupedTile, int64_t, int64_t) { absent(); }
void grouped_gemm(GroupedProduct, GroupedTile, const GroupedGemm&) { absent(); }
int square_sum_blocks(int64_t) { absent(); }
void sum_squares(const SquareSums&, CUstream_st*) { absent(); }
void rms_norm(const RmsNorm&, CUstream_st*) { absent(); }
void rms_norm_backward(const RmsNormBackward&, CUstream_st*) { absent(); }
void qk_norm_rope(const QkNormRope&, CUstream_st*) { absent(); }
void qk_norm_rope_backward(const QkNormRopeBackward&, CUstream_st*) { absent(); }
int64_t routing_blocks(int64_t, int) { absent(); }
void routing_forward(const RoutingForward&, CUstream_st*) { absent(); }
void routing_measures(const RoutingMeasures&, CUstream_st*) { absent(); }
void routing_backward(const RoutingBackward&, CUstream_st*) { absent(); }
void split_into_terms(const Terms&, CUstream_st*) { absent(); }
int64_t padded_outputs(int64_t) { absent(); }
void router_product(const RouterProduct&, CUstream_st*) { absent(); }
void router_weight_gradient(const RouterProduct&, CUstream_st*) { absent(); }
int64_t row_splits(int64_t, int64_t, int64_t) { absent(); }
void add_partial_sums(float*, const float*, int64_t, int64_t, CUstream_st*) { absent(); }
void swiglu(const Swiglu&, CUstream_st*) { absent(); }
void swiglu_backward(const SwigluBackward&, CUstream_st*) { absent(); }
void copy_rows(const RowCopies&, CUstream_st*) { absent(); }
void sum_rows(const RowSums&, CUstream_st*) { absent(); }
void sort_by_expert(const Sort&, CUstream_st*) { absent(); }
void count_by_expert(const Count&, CUstream_st*) { absent(); }

}  // namespace upcycle::cuda
