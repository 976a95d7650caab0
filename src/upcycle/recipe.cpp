// C copies, G granularity (shards of a copy), N = C * G experts, K experts per token, f dense width
#include "upcycle/recipe.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>

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
  if (N < 1) fail("moe.experts = ", N, ": upcycling needs at least one expert");
  if (G < 1) fail("moe.granularity = ", G, ": a feed-forward is cut into at least one shard");
  if (K < 1 || K > N) fail("moe.top_k = ", K, " of moe.experts = ", N, ": a token takes between 1 and ", N, " experts");
  if (N % G != 0) {
    fail("moe.experts = ", N, " is not a multiple of moe.granularity = ", G, ": every copy has ", G, " shards, so take ",
         std::max<int64_t>(1, N / G) * G, " or ", (N / G + 1) * G, " experts");
  }
  if (f % G != 0) fail("intermediate_size = ", f, " can't be cut into moe.granularity = ", G, " equal shards");
}

/// What must hold for the experts to be copies of a mixture's.
void check_copies(const Architecture& source, const MoeSection& moe) {
  const int64_t n = source.experts, N = moe.experts, K = moe.top_k;
  if (moe.granularity != 1) {
    fail("the source is a mixture of ", n, " experts, which are copied whole: moe.granularity = ", moe.granularity, " has to be 1");
  }
  if (moe.layers_text != "all") {
    fail("moe.layers = \"", moe.layers_text, "\": the source is a mixture, and which of its layers have experts is settled; leave the key out");
  }
  if (N <= n || N % n != 0) {
    fail("moe.experts = ", N, ": the source is a mixture of ", n, " experts, and each is copied as often, so take ",
         N <= n ? text(2 * n) : text(N / n * n, " or ", (N / n + 1) * n));
  }
  if (K < 1 || K > N) fail("moe.top_k = ", K, " of moe.experts = ", N, ": a token takes between 1 and ", N, " experts");
}

/// What must hold for step 0 to be the source's function: all copies of the experts that the source takes, with its kind of weights.
void check_exact(const Architecture& source, const MoeSection& moe) {
  const int64_t copies = moe.experts / source.experts;
  if (moe.top_k != copies * source.top_k) {
    fail("upcycle.scaling = \"exact\" needs moe.top_k = ", copies * source.top_k, ": the source takes ", source.top_k, " of its ", source.experts,
         " experts, and each is there ", copies, " times; with moe.top_k = ", moe.top_k, " copies of the best experts would crowd out the next. Take ",
         copies * source.top_k, ", or upcycle.scaling = \"none\"");
  }
  if (moe.pre_softmax == source.renormalise) {
    fail("upcycle.scaling = \"exact\" with moe.pre_softmax = ", moe.pre_softmax ? "true" : "false", ": the source's weights are ",
         source.renormalise ? "" : "not ", "renormalised over its top ", source.top_k, " experts; say the same, or upcycle.scaling = \"none\"");
  }
}

/// How many of `copies` each of several models gets.
std::vector<int64_t> quotas_of(const SourceSection& source, int64_t copies) {
  const auto models = static_cast<int64_t>(source.models.size());
  if (source.quotas.empty()) {
    if (models < 2) return {};
    if (copies < models) fail("source.models: ", models, " models, but moe.experts and moe.granularity make ", copies, " copies: each model needs at least one");
    std::vector<int64_t> out;
    for (int64_t i = 0; i < models; ++i) out.push_back((i + 1) * copies / models - i * copies / models);
    return out;
  }
  int64_t sum = 0;
  for (const int64_t quota : source.quotas) sum += quota;
  if (sum != copies) {
    fail("source.quotas add up to ", sum, ", but moe.experts and moe.granularity make ", copies, " copies: every copy is of one of source.models");
  }
  return models < 2 ? std::vector<int64_t>{} : source.quotas;
}

/// What is for dense sources alone.
void refuse_for_mixtures(const UpcycleSection& upcycle) {
  if (upcycle.permutation != UnitOrder::identity) {
    fail("upcycle.permutation: an order of hidden units decides what a shard of a dense feed-forward holds, but the source is a mixture, whose ",
         "experts are copied whole; leave the key out");
  }
  if (upcycle.scaling == Scaling::cube_root) {
    fail("upcycle.scaling = \"cube-root\" is for shards of a dense feed-forward, but the source is a mixture, whose experts are copied whole: ",
         "say \"exact\" or \"none\"");
  }
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

int64_t Recipe::source_of(int64_t copy) const {
  int64_t source = 0;
  for (int64_t end = 0; source < static_cast<int64_t>(quotas.size()); ++source) {
    end += quotas[static_cast<size_t>(source)];
    if (copy < end) return source;
  }
  return 0;
}

Exactness Recipe::exactness() const {
  if (of_mixture()) {
    const bool same = moe.top_k == copies * source.top_k && moe.renormalise == source.renormalise;
    return drop > 0 ? Exactness::destructive : noise > 0 || !same ? Exactness::approximate : Exactness::exact;
  }
  const bool whole_copies = moe.top_k % granularity == 0;
  if (drop > 0 || !whole_copies || (scaling == Scaling::none && granularity > 1)) return Exactness::destructive;
  if (!sources_alike || noise > 0 || !moe.renormalise || (scaling == Scaling::cube_root && granularity > 1)) return Exactness::approximate;
  return Exactness::exact;
}

bool Recipe::lossless() const {
  return noise == 0 && drop == 0 && is_power_of_two(gate_factor) && is_power_of_two(up_factor) && is_power_of_two(down_factor);
}

Architecture moe_architecture(const Architecture& source, const MoeSection& section) {
  source.is_moe() ? check_copies(source, section) : check_shape(source, section);
  Architecture moe = source;
  moe.experts = section.experts;
  moe.top_k = section.top_k;
  moe.renormalise = !section.pre_softmax;
  if (!source.is_moe()) {
    moe.expert_ffn = source.ffn / section.granularity;
    apply_layers(section.layers_text, moe);
  }
  const auto total = static_cast<double>(count_parameters(moe).total);
  if (total > section.max_parameters) {
    fail("moe.experts = ", section.experts, " at moe.granularity = ", section.granularity, " would have ", billions(total),
         " parameters, more than moe.max_parameters = ", billions(section.max_parameters), "; these are ",
         source.is_moe() ? text(section.experts / source.experts, " copies of each expert: take fewer")
                         : text(section.experts / section.granularity, " copies of the dense feed-forwards: take fewer experts or a finer granularity"));
  }
  return moe;
}

Architecture dense_form(const Architecture& moe) {
  const Architecture none;
  Architecture dense = moe;
  dense.experts = none.experts, dense.top_k = none.top_k, dense.expert_ffn = none.expert_ffn;
  dense.renormalise = none.renormalise, dense.sparse_step = none.sparse_step, dense.dense_layers = none.dense_layers;
  return dense;
}

Recipe make_recipe(const Architecture& source, const RunConfig& run) {
  Recipe recipe;
  recipe.source = source;
  recipe.moe = moe_architecture(source, run.moe);
  const bool exact = run.upcycle.scaling == Scaling::exact;
  if (source.is_moe()) {
    refuse_for_mixtures(run.upcycle);
    if (run.source.models.size() > 1) fail("source.models: several sources become experts of one model when they are dense; these are mixtures of ", source.experts);
    if (exact) check_exact(source, run.moe);
    recipe.copies = run.moe.experts / source.experts;
  } else {
    if (exact) check_exact(run.moe);
    recipe.granularity = run.moe.granularity;
    recipe.copies = run.moe.experts / run.moe.granularity;
    recipe.quotas = quotas_of(run.source, recipe.copies);
    for (const std::string& model : run.source.models) recipe.sources_alike = recipe.sources_alike && model == run.source.models.front();
  }
  recipe.scaling = run.upcycle.scaling;
  recipe.permutation = run.upcycle.permutation;
  recipe.router_logit_std = run.upcycle.router_logit_std;
  recipe.noise = run.upcycle.noise;
  recipe.drop = run.upcycle.drop;
  recipe.drop_indices = run.upcycle.drop_indices;
  recipe.seed = static_cast<uint64_t>(run.run.seed);
  set_factors(recipe);
  return recipe;
}

}  // namespace upcycle
