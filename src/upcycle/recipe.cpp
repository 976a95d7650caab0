// C copies, G granularity (shards of a copy), N = C * G experts, K experts per token, f dense width
#include "upcycle/recipe.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

namespace {

bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

std::string billions(double number) {
  char out[32];
  std::snprintf(out, sizeof out, "%.4ge9", number / 1e9);
  return out;
}

[[noreturn]] void bad_layers(const std::string& layers, const std::string& why) {
  fail("moe.layers = \"", layers, "\": ", why,
       "; Hugging Face's config can say \"all\", \"every:2\" (each second layer), \"first-dense:1\" (the first layer stays dense) ",
       "or a list of the MoE layers such as [2, 3]");
}

int64_t number_in(const std::string& digits, const std::string& layers) {
  int64_t value = 0;
  const char *begin = digits.data(), *end = begin + digits.size();
  const auto [rest, error] = std::from_chars(begin, end, value);
  if (error != std::errc() || rest != end || value < 0) bad_layers(layers, "'" + digits + "' is not a layer or a count");
  return value;
}

/// "[0, 1, 2]" -> {0, 1, 2}
std::set<int64_t> listed_layers(const std::string& layers, int64_t num_layers) {
  std::set<int64_t> out;
  std::string digits;
  for (const char c : layers.substr(1)) {
    if (c == ',' || c == ']') {
      if (digits.empty() && c == ']' && out.empty()) break;
      const int64_t layer = number_in(digits, layers);
      if (layer >= num_layers) bad_layers(layers, text("there is no layer ", layer, ", the model has ", num_layers));
      if (!out.insert(layer).second) bad_layers(layers, text("layer ", layer, " is listed twice"));
      digits.clear();
    } else if (c != ' ') {
      digits += c;
    }
  }
  return out;
}

/// Writes which layers have experts into `moe`, in HF's two keys.
void apply_layers(const std::string& layers, Architecture& moe) {
  if (layers.starts_with("every:")) {
    moe.sparse_step = number_in(layers.substr(6), layers);
    if (moe.sparse_step < 1) bad_layers(layers, "the step must be at least 1");
  } else if (layers.starts_with("first-dense:")) {
    const int64_t dense = number_in(layers.substr(12), layers);
    for (int64_t layer = 0; layer < std::min(dense, moe.layers); ++layer) moe.dense_layers.insert(layer);
  } else if (layers.starts_with("[") && layers.ends_with("]")) {
    const std::set<int64_t> with_experts = listed_layers(layers, moe.layers);
    for (int64_t layer = 0; layer < moe.layers; ++layer) {
      if (!with_experts.contains(layer)) moe.dense_layers.insert(layer);
    }
  } else if (layers != "all") {
    bad_layers(layers, "not understood");
  }
  if (moe.num_moe_layers() == 0) bad_layers(layers, text("none of the ", moe.layers, " layers would have experts"));
}

/// What must hold for the experts to be shards of copies at all.
void check_shape(const Architecture& dense, const MoeSection& moe) {
  const int64_t N = moe.experts, K = moe.top_k, G = moe.granularity, f = dense.ffn;
  if (dense.is_moe()) fail("the source is a mixture of ", dense.experts, " experts already: only a dense model can be upcycled");
  if (N < 1) fail("moe.experts = ", N, ": upcycling needs at least one expert");
  if (G < 1) fail("moe.granularity = ", G, ": a feed-forward is cut into at least one shard");
  if (K < 1 || K > N) fail("moe.top_k = ", K, " of moe.experts = ", N, ": a token takes between 1 and ", N, " experts");
  if (N % G != 0) {
    fail("moe.experts = ", N, " is not a multiple of moe.granularity = ", G, ": every copy has ", G, " shards, so take ",
         std::max<int64_t>(1, N / G) * G, " or ", (N / G + 1) * G, " experts");
  }
  if (f % G != 0) fail("intermediate_size = ", f, " can't be cut into moe.granularity = ", G, " equal shards");
}

/// What must hold for step 0 to be the dense function (spec of the scaling: renormalised weights, whole copies).
void check_exact(const MoeSection& moe) {
  const int64_t K = moe.top_k, G = moe.granularity;
  if (moe.pre_softmax) {
    fail("upcycle.scaling = \"exact\" with moe.pre_softmax = true can't be exact: weights that are not renormalised over the top ",
         K, " of ", moe.experts, " experts sum to less than 1, differently for each token; set moe.pre_softmax = false or another scaling");
  }
  if (K % G != 0) {
    fail("upcycle.scaling = \"exact\" needs moe.top_k to be a multiple of moe.granularity: ", K, " % ", G, " = ", K % G,
         ", so no token would get whole copies; take top_k = ", (K / G + 1) * G, " or another scaling");
  }
}

void set_factors(Recipe& recipe) {
  const auto G = static_cast<double>(recipe.granularity);
  if (recipe.scaling == Scaling::exact) {
    // sum over the shards of one copy of (1/G) * up_factor * down_factor * F_g = F. Never on the gate: SwiGLU bends there.
    // Halves of the exponent keep AdamW's step in function space alike for both matrices.
    const int exponent = is_power_of_two(recipe.granularity) ? std::ilogb(G) : 0;
    recipe.up_factor = std::ldexp(1.0, exponent / 2);
    recipe.down_factor = G / recipe.up_factor;
  } else if (recipe.scaling == Scaling::cube_root) {
    // Megatron-Core's upcycling, which scales all three matrices (arXiv 2410.07524, equation 2, where its E*G^2/T assumes
    // a uniform router): exact for squared ReLU, not for SwiGLU.
    const double scale = recipe.moe.renormalise ? G : static_cast<double>(recipe.copies) * G * G / static_cast<double>(recipe.moe.top_k);
    recipe.gate_factor = recipe.up_factor = recipe.down_factor = std::cbrt(scale);
  }
}

bool is_power_of_two(double factor) {
  int exponent = 0;
  return std::frexp(factor, &exponent) == 0.5;
}

}  // namespace

const char* name(Exactness exactness) noexcept {
  switch (exactness) {
    case Exactness::exact: return "exact";
    case Exactness::approximate: return "approximate";
    case Exactness::destructive: return "destructive";
  }
  return "?";
}

Exactness Recipe::exactness() const {
  const bool whole_copies = moe.top_k % granularity == 0;
  if (drop > 0 || !whole_copies || (scaling == Scaling::none && granularity > 1)) return Exactness::destructive;
  if (noise > 0 || !moe.renormalise || (scaling == Scaling::cube_root && granularity > 1)) return Exactness::approximate;
  return Exactness::exact;
}

bool Recipe::lossless() const {
  return noise == 0 && drop == 0 && is_power_of_two(gate_factor) && is_power_of_two(up_factor) && is_power_of_two(down_factor);
}

Architecture moe_architecture(const Architecture& dense, const MoeSection& section) {
  check_shape(dense, section);
  Architecture moe = dense;
  moe.experts = section.experts;
  moe.top_k = section.top_k;
  moe.expert_ffn = dense.ffn / section.granularity;
  moe.renormalise = !section.pre_softmax;
  apply_layers(section.layers_text, moe);
  const auto total = static_cast<double>(count_parameters(moe).total);
  if (total > section.max_parameters) {
    fail("moe.experts = ", section.experts, " at moe.granularity = ", section.granularity, " would have ", billions(total),
         " parameters, more than moe.max_parameters = ", billions(section.max_parameters), "; these are ",
         section.experts / section.granularity, " copies of the dense feed-forwards: take fewer experts or a finer granularity");
  }
  return moe;
}

Recipe make_recipe(const Architecture& dense, const RunConfig& run) {
  Recipe recipe;
  recipe.dense = dense;
  recipe.moe = moe_architecture(dense, run.moe);
  if (run.upcycle.scaling == Scaling::exact) check_exact(run.moe);
  recipe.granularity = run.moe.granularity;
  recipe.copies = run.moe.experts / run.moe.granularity;
  recipe.scaling = run.upcycle.scaling;
  recipe.router_logit_std = run.upcycle.router_logit_std;
  recipe.noise = run.upcycle.noise;
  recipe.drop = run.upcycle.drop;
  recipe.drop_indices = run.upcycle.drop_indices;
  recipe.seed = static_cast<uint64_t>(run.run.seed);
  set_factors(recipe);
  return recipe;
}

nlohmann::json to_json(const Recipe& recipe) {
  const char* const scalings[] = {"exact", "cube-root", "none"};
  return {
      {"experts", recipe.moe.experts},
      {"copies", recipe.copies},
      {"granularity", recipe.granularity},
      {"top_k", recipe.moe.top_k},
      {"pre_softmax", !recipe.moe.renormalise},
      {"order", "copy-major"},
      {"moe_layers", recipe.moe.num_moe_layers()},
      {"scaling", scalings[static_cast<size_t>(recipe.scaling)]},
      {"factors", {{"gate", recipe.gate_factor}, {"up", recipe.up_factor}, {"down", recipe.down_factor}}},
      {"router_logit_std", recipe.router_logit_std},
      {"noise", recipe.noise},
      {"drop", recipe.drop},
      {"drop_indices", recipe.drop_indices == DropIndices::shared ? "shared" : "per-matrix"},
      {"seed", recipe.seed},
      {"dtype", long_name(recipe.dense.dtype)},
      {"exactness", name(recipe.exactness())},
      {"lossless", recipe.lossless()},
  };
}

}  // namespace upcycle
