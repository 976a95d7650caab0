// A recipe as provenance and certificates keep it.
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

namespace {

// In the order of the enumerations.
constexpr std::array<std::string_view, 3> kScalings = {"exact", "cube-root", "none"};
constexpr std::array<std::string_view, 3> kPermutations = {"identity", "random", "clusters"};
constexpr std::array<std::string_view, 2> kDropIndices = {"shared", "per-matrix"};

template <class Enum, size_t Count>
Enum one_of(const std::array<std::string_view, Count>& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) fail("the recipe says '", name, "', which this program does not know");
  return static_cast<Enum>(found - names.begin());
}

std::map<int64_t, std::vector<int64_t>> read_clusters(const Recipe& recipe, const std::string& content) {
  const nlohmann::json json = nlohmann::json::parse(content, nullptr, false);
  std::map<int64_t, std::vector<int64_t>> out;
  for (int64_t layer = 0; layer < recipe.moe.layers; ++layer) {
    if (!recipe.moe.is_moe_layer(layer)) continue;
    const nlohmann::json units = json.is_object() ? json.value(std::to_string(layer), nlohmann::json()) : nlohmann::json();
    std::vector<bool> seen(static_cast<size_t>(recipe.source.ffn), false);
    bool whole = units.is_array() && units.size() == seen.size();
    for (size_t i = 0; whole && i < units.size(); ++i) {
      const int64_t unit = units[i].is_number_integer() ? units[i].get<int64_t>() : -1;
      whole = unit >= 0 && unit < recipe.source.ffn && !seen[static_cast<size_t>(unit)];
      if (whole) seen[static_cast<size_t>(unit)] = true;
    }
    if (!whole) {
      fail(kClustersFile, " does not say which of the ", recipe.source.ffn, " hidden units of layer ", layer,
           " are where: the recipe's permutation is \"clusters\", and it can't be known without");
    }
    out[layer] = units.get<std::vector<int64_t>>();
  }
  return out;
}

}  // namespace

std::string clusters_to_text(const Recipe& recipe) {
  nlohmann::json out = nlohmann::json::object();
  for (const auto& [layer, units] : recipe.clusters) out[std::to_string(layer)] = units;
  return out.dump() + "\n";
}

nlohmann::json to_json(const Recipe& recipe) {
  nlohmann::json out = {
      {"experts", recipe.moe.experts},
      {"copies", recipe.copies},
      {"granularity", recipe.granularity},
      {"top_k", recipe.moe.top_k},
      {"pre_softmax", !recipe.moe.renormalise},
      {"order", recipe.of_mixture() ? "copies side by side" : "copy-major"},
      {"moe_layers", recipe.moe.num_moe_layers()},
      {"scaling", kScalings[static_cast<size_t>(recipe.scaling)]},
      {"factors", {{"gate", recipe.gate_factor}, {"up", recipe.up_factor}, {"down", recipe.down_factor}}},
      {"permutation", kPermutations[static_cast<size_t>(recipe.permutation)]},
      {"router_logit_std", recipe.router_logit_std},
      {"noise", recipe.noise},
      {"drop", recipe.drop},
      {"drop_indices", kDropIndices[static_cast<size_t>(recipe.drop_indices)]},
      {"seed", recipe.seed},
      {"dtype", long_name(recipe.source.dtype)},
      {"exactness", name(recipe.exactness())},
      {"lossless", recipe.lossless()},
  };
  if (!recipe.quotas.empty()) out["quotas"] = recipe.quotas, out["sources_alike"] = recipe.sources_alike;
  if (recipe.of_mixture()) {
    out["source"] = {{"experts", recipe.source.experts}, {"top_k", recipe.source.top_k}, {"pre_softmax", !recipe.source.renormalise}};
  }
  return out;
}

Recipe recipe_from_json(const nlohmann::json& json, const Architecture& moe, const std::string& clusters) {
  Recipe out;
  try {
    out.moe = moe;
    out.source = dense_form(moe);
    if (json.contains("source")) {
      const nlohmann::json& source = json["source"];
      out.source = moe;
      out.source.experts = source.at("experts"), out.source.top_k = source.at("top_k"), out.source.renormalise = !source.at("pre_softmax").get<bool>();
    }
    out.source.dtype = dtype_from_name(json.at("dtype").get<std::string>());
    out.copies = json.at("copies");
    out.quotas = json.value("quotas", std::vector<int64_t>{});
    out.sources_alike = json.value("sources_alike", true);
    out.granularity = json.at("granularity");
    out.scaling = one_of<Scaling>(kScalings, json.at("scaling"));
    const nlohmann::json& factors = json.at("factors");
    out.gate_factor = factors.at("gate"), out.up_factor = factors.at("up"), out.down_factor = factors.at("down");
    out.permutation = one_of<UnitOrder>(kPermutations, json.value("permutation", "identity"));   // older programs knew no other
    out.router_logit_std = json.at("router_logit_std");
    out.noise = json.at("noise");
    out.drop = json.at("drop");
    out.drop_indices = one_of<DropIndices>(kDropIndices, json.at("drop_indices"));
    out.seed = json.at("seed");
  } catch (const nlohmann::json::exception& error) {
    fail("the recipe is not whole: ", error.what());
  }
  if (out.of_mixture() && out.copies * out.source.experts != moe.experts) {
    fail("the recipe speaks of ", out.copies, " copies of ", out.source.experts, " experts, but the model has ", moe.experts);
  }
  if (!out.of_mixture() && (out.granularity < 1 || out.copies * out.granularity != moe.experts || moe.expert_ffn * out.granularity != moe.ffn)) {
    fail("the recipe speaks of ", out.copies, " copies x ", out.granularity, " shards, but the model has ", moe.experts, " experts of width ",
         moe.expert_ffn, " for intermediate_size = ", moe.ffn);
  }
  if (out.permutation == UnitOrder::clusters) out.clusters = read_clusters(out, clusters);
  return out;
}

}  // namespace upcycle
