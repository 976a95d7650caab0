#include "model/attention.hpp"

#include "ops/attention.hpp"
#include "ops/linear.hpp"
#include "ops/rms_norm.hpp"
#include "parallel/regions.hpp"

namespace upcycle {

Attention::Attention(Weights& weights, const Mesh& mesh, const std::string& prefix)
    : tensor_(mesh.along(Axis::tensor)),
      head_dim_(weights.architecture().head_dim),
      eps_(weights.architecture().rms_eps),
      qkv_(weights.add({prefix + "q_proj.weight", prefix + "k_proj.weight", prefix + "v_proj.weight"})),
      q_norm_(weights.add({prefix + "q_norm.weight"})),
      k_norm_(weights.add({prefix + "k_norm.weight"})),
      out_(weights.add({prefix + "o_proj.weight"})) {
  const std::deque<Weight>& all = weights.all();
  const std::vector<Part>& parts = all[all.size() - 4].parts;  // q, k, v of qkv_
  q_width_ = parts[0].box.size[0];
  kv_width_ = parts[1].box.size[0];
}

Tensor Attention::forward(const Tensor& x_TW, const Positions& positions) {
  const Tensor qkv = linear(gather_along(tensor_, x_TW, 0), qkv_);   // all rows, this rank's heads
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
