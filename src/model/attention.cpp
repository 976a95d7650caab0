#include "model/attention.hpp"

#include <ATen/ops/cat.h>

#include <algorithm>

#include "ops/attention.hpp"
#include "ops/linear.hpp"
#include "ops/rms_norm.hpp"
#include "parallel/regions.hpp"

namespace upcycle {
namespace {

bool shares_heads(const Weights& weights, const Mesh& mesh) { return weights.architecture().kv_heads < mesh.grid().size(Axis::tensor); }

std::vector<std::string> names(const std::string& prefix, const std::vector<std::string>& projections) {
  std::vector<std::string> out;
  for (const std::string& projection : projections) out.push_back(prefix + projection + "_proj.weight");
  return out;
}

}  // namespace

Attention::Attention(Weights& weights, const Mesh& mesh, const std::string& prefix)
    : tensor_(mesh.along(Axis::tensor)),
      head_dim_(weights.architecture().head_dim),
      eps_(weights.architecture().rms_eps),
      qkv_(weights.add(shares_heads(weights, mesh) ? names(prefix, {"q"}) : names(prefix, {"q", "k", "v"}))),
      kv_(shares_heads(weights, mesh) ? &weights.add(names(prefix, {"k", "v"})) : nullptr),
      q_norm_(weights.add({prefix + "q_norm.weight"})),
      k_norm_(weights.add({prefix + "k_norm.weight"})),
      out_(weights.add({prefix + "o_proj.weight"})) {
  const Architecture& a = weights.architecture();
  const int64_t ranks = mesh.grid().size(Axis::tensor);
  q_width_ = a.heads / ranks * head_dim_;
  kv_width_ = std::max<int64_t>(a.kv_heads / ranks, 1) * head_dim_;
}

Tensor Attention::forward(const Tensor& x_TW, const Positions& positions) {
  const Tensor x = gather_along(tensor_, x_TW, 0);   // all rows, this rank's heads
  const Tensor qkv = kv_ ? at::cat({linear(x, qkv_), linear(x, *kv_)}, -1) : linear(x, qkv_);
  const int64_t batch = positions.sequences, length = qkv.size(0) / batch;
  const auto heads = [&](int64_t begin, int64_t width) {
    return qkv.narrow(-1, begin, width).view({batch, length, width / head_dim_, head_dim_});
  };
  const Tensor q_BSHD = rotate(rms_norm(heads(0, q_width_), q_norm_, eps_), positions.rotary);
  const Tensor k_BSGD = rotate(rms_norm(heads(q_width_, kv_width_), k_norm_, eps_), positions.rotary);
  const Tensor v_BSGD = heads(q_width_ + kv_width_, kv_width_);
  const Tensor out_BSHD = attention(q_BSHD, k_BSGD, v_BSGD).out_BSHD;
  return reduce_scatter_along(tensor_, linear(out_BSHD.reshape({batch * length, q_width_}), out_), 0);
}

}  // namespace upcycle
