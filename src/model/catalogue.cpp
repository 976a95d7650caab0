// h hidden, f dense feed-forward width, fe expert width, N experts, K experts per token, V vocabulary
// q heads * head_dim, kv kv_heads * head_dim
#include "model/catalogue.hpp"

#include <algorithm>
#include <stdexcept>

#include "base/error.hpp"
#include "base/nearest.hpp"

namespace upcycle {

namespace {

using enum Axis;

std::string layer_name(int64_t layer, const char* rest) { return text("model.layers.", layer, ".", rest, ".weight"); }

void add_attention(std::vector<ParameterSpec>& out, const Architecture& a, int64_t i) {
  const int64_t h = a.hidden, d = a.head_dim, q = a.heads * d, kv = a.kv_heads * d;
  const Role role = Role::attention;
  out.push_back({layer_name(i, "self_attn.q_proj"), {q, h}, {{tensor, 0, a.heads}}, role, i});
  out.push_back({layer_name(i, "self_attn.k_proj"), {kv, h}, {{tensor, 0, a.kv_heads}}, role, i});
  out.push_back({layer_name(i, "self_attn.v_proj"), {kv, h}, {{tensor, 0, a.kv_heads}}, role, i});
  out.push_back({layer_name(i, "self_attn.q_norm"), {d}, {}, Role::norm, i});
  out.push_back({layer_name(i, "self_attn.k_norm"), {d}, {}, Role::norm, i});
  out.push_back({layer_name(i, "self_attn.o_proj"), {h, q}, {{tensor, 1, a.heads}}, role, i, true});
}

void add_feed_forward(std::vector<ParameterSpec>& out, const Architecture& a, int64_t i) {
  const int64_t h = a.hidden, f = a.ffn;
  const Role role = Role::feed_forward;
  out.push_back({layer_name(i, "mlp.gate_proj"), {f, h}, {{tensor, 0, f}}, role, i});
  out.push_back({layer_name(i, "mlp.up_proj"), {f, h}, {{tensor, 0, f}}, role, i});
  out.push_back({layer_name(i, "mlp.down_proj"), {h, f}, {{tensor, 1, f}}, role, i, true});
}

void add_experts(std::vector<ParameterSpec>& out, const Architecture& a, int64_t i) {
  const int64_t h = a.hidden, fe = a.expert_ffn, N = a.experts;
  const Role role = Role::expert;
  out.push_back({layer_name(i, "mlp.gate"), {N, h}, {}, Role::router, i});
  out.push_back({layer_name(i, "mlp.experts.gate_proj"), {N, fe, h}, {{expert, 0, N}, {expert_tensor, 1, fe}}, role, i});
  out.push_back({layer_name(i, "mlp.experts.up_proj"), {N, fe, h}, {{expert, 0, N}, {expert_tensor, 1, fe}}, role, i});
  out.push_back({layer_name(i, "mlp.experts.down_proj"), {N, h, fe}, {{expert, 0, N}, {expert_tensor, 2, fe}}, role, i, true});
}

struct Interval {
  int64_t begin, size;
};

/// Part `index` of `length` rows in `parts` parts, as `cut` says.
Interval part_of(int64_t length, const Cut& cut, int64_t parts, int64_t index) {
  if (cut.units == 0) {
    const int64_t begin = index * length / parts;
    return {begin, (index + 1) * length / parts - begin};
  }
  const int64_t unit = length / cut.units;
  if (cut.units >= parts) {
    const int64_t units = cut.units / parts;
    return {index * units * unit, units * unit};
  }
  return {index * cut.units / parts * unit, unit};
}

void demand(bool divides, Axis axis, int64_t parts, const char* key, int64_t number) {
  if (!divides) fail(name(axis), " = ", parts, " does not divide ", key, " = ", number, ": ", nearest_divisors(parts, number), " would");
}

}  // namespace

std::vector<ParameterSpec> catalogue(const Architecture& a) {
  std::vector<ParameterSpec> out;
  const int64_t h = a.hidden;
  out.push_back({"model.embed_tokens.weight", {a.vocab, h}, {{tensor, 0}}, Role::embedding});
  for (int64_t i = 0; i < a.layers; ++i) {
    out.push_back({layer_name(i, "input_layernorm"), {h}, {}, Role::norm, i});
    add_attention(out, a, i);
    out.push_back({layer_name(i, "post_attention_layernorm"), {h}, {}, Role::norm, i});
    a.is_moe_layer(i) ? add_experts(out, a, i) : add_feed_forward(out, a, i);
  }
  out.push_back({"model.norm.weight", {h}, {}, Role::norm});
  if (!a.tied) out.push_back({"lm_head.weight", {a.vocab, h}, {{tensor, 0}}, Role::head});
  return out;
}

const ParameterSpec& find(const std::vector<ParameterSpec>& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const ParameterSpec& spec) { return spec.name == name; });
  if (found == specs.end()) throw std::out_of_range("no parameter is called " + name);
  return *found;
}

void check_divides(const Architecture& a, const Grid& grid) {
  const int64_t tp = grid.size(tensor), ep = grid.size(expert), etp = grid.size(expert_tensor);
  demand(a.heads % tp == 0, tensor, tp, "num_attention_heads", a.heads);
  if (a.kv_heads % tp != 0 && tp % a.kv_heads != 0) {
    const auto fits = [&](int64_t t) { return a.kv_heads % t == 0 || t % a.kv_heads == 0; };
    fail("tensor = ", tp, " and num_key_value_heads = ", a.kv_heads, ": one must divide the other, as ", nearest(tp, a.heads, fits), " would");
  }
  if (a.num_moe_layers() < a.layers) demand(a.ffn % tp == 0, tensor, tp, "intermediate_size", a.ffn);
  if (a.is_moe()) {
    demand(a.experts % ep == 0, expert, ep, "num_experts", a.experts);
    demand(a.expert_ffn % etp == 0, expert_tensor, etp, "moe_intermediate_size", a.expert_ffn);
  } else if (ep > 1 || etp > 1) {
    fail("expert = ", ep, ", expert_tensor = ", etp, ": a dense model has no experts to spread; leave both at 1");
  }
  if (tp > a.vocab) fail("tensor = ", tp, " ranks for vocab_size = ", a.vocab, ": each needs at least one row, so ", a.vocab, " is the most");
}

bool owns(const ParameterSpec& spec, const Layout& layout, int stage) {
  const int last = layout.grid.size(pipeline) - 1;
  if (spec.layer >= 0) return layout.stage_of(spec.layer) == stage;
  if (spec.role == Role::embedding) return stage == 0 || (layout.tied && stage == last);
  return stage == last;
}

std::optional<Box> local_box(const ParameterSpec& spec, const Layout& layout, const Coordinates& here) {
  if (!owns(spec, layout, here[pipeline])) return std::nullopt;
  Box box = whole(spec.shape);
  for (const Cut& cut : spec.cuts) {
    const auto dim = static_cast<size_t>(cut.dim);
    const Interval part = part_of(spec.shape[dim], cut, layout.grid.size(cut.axis), here[cut.axis]);
    box.begin[dim] = part.begin;
    box.size[dim] = part.size;
  }
  return box;
}

ParameterCount count_parameters(const Architecture& a) {
  ParameterCount count;
  for (const ParameterSpec& spec : catalogue(a)) {
    const int64_t numbers = elements(spec.shape);
    count.total += numbers;
    count.active += spec.role == Role::expert ? numbers / a.experts * a.top_k : numbers;
  }
  return count;
}

}  // namespace upcycle
