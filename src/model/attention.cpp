#include "model/attention.hpp"

#include <ATen/ops/cat.h>

#include <algorithm>

#include "model/gathered_linear.hpp"
#include "ops/attention.hpp"
#include "ops/linear.hpp"
#include "ops/qk_norm_rope.hpp"
#include "parallel/regions.hpp"

namespace upcycle {
namespace {

bool shares_heads(const Weights& weights, const Mesh& mesh) { return weights.architecture().kv_heads < mesh.grid().size(Axis::tensor); }

std::vector<std::string> names(const std::string& prefix, const std::vector<std::string>& projections) {
  std::vector<std::string> out;
  for (const std::string& projection : projections) out.push_back(prefix + projection + "_proj.weight");
  return out;
}

// Keys and values of all context ranks, in one call. An all-gather, not a ring of partial attentions: with few key/value heads they
// are small beside the queries, and any mask, that of packed documents too, works on them as they are. So does Llama 3, for both
// reasons (arXiv 2407.21783, section 3.3.2).
std::pair<Tensor, Tensor> whole_sequence(const Communicator& context, const Tensor& k_BSGD, const Tensor& v_BSGD, Remade& remade, const Meanwhile& meanwhile) {
  if (context.size() == 1) return {k_BSGD, v_BSGD};
  const int64_t groups = k_BSGD.size(2);
  const auto of_all = [&context](const Tensor& k, const Tensor& v, const Meanwhile& meanwhile) { return gather_sequence(context, at::cat({k, v}, 2), meanwhile); };
  const Tensor both = of_all(k_BSGD, v_BSGD, meanwhile);
  remade.add(both, [of_all, k = k_BSGD.detach(), v = v_BSGD.detach()] { return of_all(k, v, {}); });
  const Tensor raw = both.detach();   // ATen's own backward of a slice fills the whole with zeros first
  const std::vector<Tensor> apart = record({raw.narrow(2, 0, groups), raw.narrow(2, groups, groups)}, {both},
                                           [](const std::vector<Tensor>& d) { return Gradients{at::cat({d[0], d[1]}, 2)}; });
  return {apart[0], apart[1]};
}

}  // namespace

Attention::Attention(Weights& weights, const Mesh& mesh, int64_t layer, const std::string& prefix)
    : tensor_(mesh.along(Axis::tensor)),
      context_(mesh.along(Axis::context)),
      layer_(layer),
      eps_(weights.architecture().rms_eps),
      qkv_(weights.add(shares_heads(weights, mesh) ? names(prefix, {"q"}) : names(prefix, {"q", "k", "v"}))),
      kv_(shares_heads(weights, mesh) ? &weights.add(names(prefix, {"k", "v"})) : nullptr),
      q_norm_(weights.add({prefix + "q_norm.weight"})),
      k_norm_(weights.add({prefix + "k_norm.weight"})),
      out_(weights.add({prefix + "o_proj.weight"})) {
  const Architecture& a = weights.architecture();
  const int64_t ranks = mesh.grid().size(Axis::tensor);
  heads_ = a.heads / ranks;
  kv_heads_ = std::max<int64_t>(a.kv_heads / ranks, 1);
}

Tensor Attention::forward(const Tensor& x_TW, const Positions& positions, Remade& remade) {
  const auto [rows, own] = gathered_linear(tensor_, x_TW, qkv_, remade);   // all rows, this rank's heads
  const Tensor qkv = kv_ ? at::cat({own, linear(rows, *kv_)}, -1) : own;
  const HeadColumns columns = {positions.sequences, heads_, kv_heads_, eps_, positions.rotary};
  const auto [q_BSHD, k_BSGD, v_BSGD] = qk_norm_rope(qkv, q_norm_, k_norm_, columns);
  remade.add(q_BSHD, [this, columns, qkv = qkv.detach()] { return normed_q(qkv, q_norm_, columns); });
  remade.add(k_BSGD, [this, columns, qkv = qkv.detach()] { return normed_k(qkv, k_norm_, columns); });
  std::vector<Dense> own_part;   // of attention, made while the keys and values of the other context ranks travel
  const auto attend_to_own = [&, &q = q_BSHD, &k = k_BSGD, &v = v_BSGD] { own_part = attend_own(q.detach(), k.detach(), v.detach(), positions.segments); };
  const auto [k_BPGD, v_BPGD] = positions.before ? positions.before->with(layer_, k_BSGD, v_BSGD)
                                                 : whole_sequence(context_, k_BSGD, v_BSGD, remade, attend_to_own);
  const Tensor out_BSHD = attention(q_BSHD, k_BPGD, v_BPGD, positions.segments, AttentionKernel::automatic, own_part).out_BSHD;
  const auto flat = [shape = Shape{qkv.size(0), heads_ * q_BSHD.size(3)}](const Tensor& out) { return out.reshape(shape); };
  const Tensor out_NH = flat(out_BSHD);
  if (!out_NH.is_alias_of(out_BSHD)) remade.add(out_NH, [flat, out = out_BSHD.detach()] { return flat(out); });
  return reduce_scatter_along(tensor_, linear(out_NH, out_), 0);
}

}  // namespace upcycle
