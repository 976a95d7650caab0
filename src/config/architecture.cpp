#include "config/architecture.hpp"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/dtype.hpp"
#include "base/error.hpp"

namespace upcycle {
namespace {

using nlohmann::json;

/// Reads typed values out of one config.json; every complaint names file and key.
class Config {
 public:
  Config(const json& object, const std::string& where) : object_(object), where_(where) {
    if (!object.is_object()) fail(where, ": a JSON object is expected, this is ", object.type_name());
  }

  template <class... Parts>
  [[noreturn]] void refuse(const std::string& key, const Parts&... parts) const {
    fail(where_, ": ", key, parts...);
  }

  /// The value of `key`; null for a key that is absent or null, which readers of config.json do not tell apart.
  const json& at(const std::string& key) const {
    static const json nothing;
    const auto found = object_.find(key);
    return found == object_.end() ? nothing : *found;
  }
  bool has(const std::string& key) const { return !at(key).is_null(); }

  int64_t integer(const std::string& key, int64_t least) const {
    constexpr int64_t kMost =
        int64_t{1} << 24;  // beyond any model, and products of three stay far from overflow in practice
    const json& value = at(key);
    if (value.is_null()) refuse(key, " is missing");
    const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t{kMost} : value.is_number_integer();
    if (!value.is_number_integer() || !fits || value.get<int64_t>() < least || value.get<int64_t>() > kMost) {
      refuse(key, " = ", value.dump(), ": an integer from ", least, " to ", kMost, " is expected");
    }
    return value.get<int64_t>();
  }
  int64_t integer(const std::string& key, int64_t least, int64_t otherwise) const {
    return has(key) ? integer(key, least) : otherwise;
  }

  double positive(const json& value, const std::string& key) const {
    if (!value.is_number() || !std::isfinite(value.get<double>()) || value.get<double>() <= 0.0) {
      refuse(key, " = ", value.dump(), ": a positive number is expected");
    }
    return value.get<double>();
  }

  bool flag(const std::string& key, bool otherwise) const {
    const json& value = at(key);
    if (value.is_null()) return otherwise;
    if (!value.is_boolean()) refuse(key, " = ", value.dump(), ": true or false is expected");
    return value.get<bool>();
  }

  std::optional<std::string> text(const std::string& key) const {
    const json& value = at(key);
    if (value.is_null()) return std::nullopt;
    if (!value.is_string()) refuse(key, " = ", value.dump(), ": a string is expected");
    return value.get<std::string>();
  }

 private:
  const json& object_;
  const std::string& where_;
};

constexpr auto kOnly = ": only Qwen3ForCausalLM (qwen3) and Qwen3MoeForCausalLM (qwen3_moe) are read";

/// True for Qwen3-MoE, false for Qwen3.
bool is_moe(const Config& config) {
  std::optional<bool> moe;
  if (const auto type = config.text("model_type")) {
    if (*type != "qwen3" && *type != "qwen3_moe") config.refuse("model_type", " = \"", *type, "\"", kOnly);
    moe = *type == "qwen3_moe";
  }
  if (config.has("architectures")) {
    const json& names = config.at("architectures");
    if (names != json{"Qwen3ForCausalLM"} && names != json{"Qwen3MoeForCausalLM"}) {
      config.refuse("architectures", " = ", names.dump(), kOnly);
    }
    const bool named_moe = names == json{"Qwen3MoeForCausalLM"};
    if (moe.value_or(named_moe) != named_moe) {
      config.refuse("architectures", " = ", names.dump(), " contradicts model_type = ", config.at("model_type").dump());
    }
    moe = named_moe;
  }
  if (!moe) config.refuse("model_type", " is missing", kOnly);
  return *moe;
}

/// Whatever would make the model another function than the one this program computes.
void refuse_other_functions(const Config& config, bool moe, int64_t layers) {
  if (config.has("quantization_config")) {
    config.refuse("quantization_config", " is set: quantised weights are not read; use the bf16 model");
  }
  if (config.flag("attention_bias", false))
    config.refuse("attention_bias", " = true: attention without biases is expected");
  if (const auto act = config.text("hidden_act"); act && *act != "silu") {
    config.refuse("hidden_act", " = \"", *act, "\": only silu is computed");
  }
  // transformers: Qwen3 windows the layers from max_window_layers on, Qwen3-MoE all of them.
  if (config.flag("use_sliding_window", false) && config.has("sliding_window") &&
      (moe || config.integer("max_window_layers", 0, 28) < layers)) {
    config.refuse("use_sliding_window", " = true: sliding windows are in use; only full attention is computed");
  }
  if (config.has("layer_types")) {
    const json& types = config.at("layer_types");
    if (!types.is_array()) config.refuse("layer_types", " = ", types.dump(), ": a list is expected");
    for (const json& type : types) {
      if (type != "full_attention")
        config.refuse("layer_types", " has ", type.dump(), ": only full_attention is computed");
    }
  }
}

/// From rope_theta (the hub's form) or rope_parameters (transformers 5); scaled variants (YaRN, linear, ...) are
/// refused.
double rope_theta(const Config& config, const std::string& where) {
  std::optional<double> theta;
  if (config.has("rope_theta")) theta = config.positive(config.at("rope_theta"), "rope_theta");
  for (const std::string key : {"rope_scaling", "rope_parameters"}) {
    if (!config.has(key)) continue;
    const Config rope(config.at(key), where + ": " + key);
    for (const std::string kind : {"rope_type", "type"}) {
      if (const auto type = rope.text(kind); type && *type != "default") {
        config.refuse(key, ".", kind, " = \"", *type, "\": rope scaling is not computed");
      }
    }
    if (rope.has("factor")) config.refuse(key, ".factor is set: rope scaling is not computed");
    if (rope.has("partial_rotary_factor") && rope.at("partial_rotary_factor") != 1.0) {
      config.refuse(key, ".partial_rotary_factor = ", rope.at("partial_rotary_factor").dump(), ": only 1 is computed");
    }
    if (!rope.has("rope_theta")) continue;
    const double inner = config.positive(rope.at("rope_theta"), key + ".rope_theta");
    if (theta.value_or(inner) != inner)
      config.refuse(key, ".rope_theta = ", inner, " contradicts rope_theta = ", *theta);
    theta = inner;
  }
  if (!theta) config.refuse("rope_theta", " is missing (and there is no rope_parameters.rope_theta)");
  return *theta;
}

/// One number under its old or its new name; both are fine when they agree.
int64_t either(const Config& config, const std::string& hub, const std::string& newer) {
  if (!config.has(newer)) return config.integer(hub, 1);
  const int64_t value = config.integer(newer, 1);
  if (config.has(hub) && config.integer(hub, 1) != value) {
    config.refuse(hub, " = ", config.integer(hub, 1), " contradicts ", newer, " = ", value);
  }
  return value;
}

void read_experts(const Config& config, Architecture& a) {
  a.experts = either(config, "num_experts", "num_local_experts");
  a.top_k = config.integer("num_experts_per_tok", 1);
  a.expert_ffn = config.integer("moe_intermediate_size", 1);
  a.renormalise = config.flag("norm_topk_prob", false);  // transformers' default, unlike every published Qwen3-MoE
  a.sparse_step = config.integer("decoder_sparse_step", 1, 1);
  if (a.top_k > a.experts) {
    config.refuse("num_experts_per_tok", " = ", a.top_k, " is more than the ", a.experts, " experts");
  }
  if (!config.has("mlp_only_layers")) return;
  const json& dense = config.at("mlp_only_layers");
  if (!dense.is_array()) config.refuse("mlp_only_layers", " = ", dense.dump(), ": a list is expected");
  for (const json& layer : dense) {
    if (!layer.is_number_integer() || layer < 0 || layer >= a.layers) {
      config.refuse("mlp_only_layers", " has ", layer.dump(), ": layers are 0 to ", a.layers - 1);
    }
    a.dense_layers.insert(layer.get<int64_t>());
  }
}

json drop_foreign_keys(const json& extra) {
  json config = extra.is_object() ? extra : json::object();
  // Keys of other forms of the same facts: left in place they would contradict what is written.
  for (const char* key :
       {"num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers", "rope_parameters", "dtype", "layer_types", "transformers_version",
        "_name_or_path", "output_router_logits", "router_aux_loss_coef"}) {
    config.erase(key);
  }
  return config;
}

}  // namespace

int64_t Architecture::num_moe_layers() const {
  int64_t count = 0;
  for (int64_t layer = 0; layer < layers; ++layer) count += is_moe_layer(layer);
  return count;
}

Architecture architecture_from_hf(const json& object, const std::string& where) {
  const Config config(object, where);
  const bool moe = is_moe(config);
  Architecture a;
  a.hidden = config.integer("hidden_size", 1);
  a.layers = config.integer("num_hidden_layers", 1);
  a.heads = config.integer("num_attention_heads", 1);
  a.kv_heads = config.integer("num_key_value_heads", 1);
  // Without head_dim, transformers takes 128 for Qwen3 and hidden/heads for Qwen3-MoE: a guess here would be a wrong
  // model.
  a.head_dim = config.integer("head_dim", 2);
  a.ffn = config.integer("intermediate_size", 1);
  a.vocab = config.integer("vocab_size", 1);
  a.max_positions = config.integer("max_position_embeddings", 1, a.max_positions);
  a.rope_theta = rope_theta(config, where);
  if (config.has("rms_norm_eps")) a.rms_eps = config.positive(config.at("rms_norm_eps"), "rms_norm_eps");
  a.tied = config.flag("tie_word_embeddings", false);
  for (const std::string key : {"torch_dtype", "dtype"}) {
    if (const auto name = config.text(key))
      a.dtype = while_doing(where + ": " + key, [&] { return dtype_from_name(*name); });
  }
  if (a.heads % a.kv_heads != 0) {
    config.refuse("num_attention_heads", " = ", a.heads, " is not a multiple of num_key_value_heads = ", a.kv_heads);
  }
  if (a.head_dim % 2 != 0) config.refuse("head_dim", " = ", a.head_dim, ": RoPE turns pairs, an even number is needed");
  refuse_other_functions(config, moe, a.layers);
  if (moe) read_experts(config, a);
  return a;
}

Architecture read_architecture(const std::filesystem::path& config_json) {
  std::ifstream file(config_json);
  json config;
  if (!file || std::filesystem::is_directory(config_json)) fail(config_json.string(), ": cannot be opened");
  try {
    config = json::parse(file);
  } catch (const json::parse_error& error) {
    fail(config_json.string(), ": not valid JSON at byte ", error.byte);
  }
  return architecture_from_hf(config, config_json.string());
}

json to_hf(const Architecture& a, const json& extra) {
  json config = drop_foreign_keys(extra);
  config["architectures"] = json::array({a.is_moe() ? "Qwen3MoeForCausalLM" : "Qwen3ForCausalLM"});
  config["model_type"] = a.is_moe() ? "qwen3_moe" : "qwen3";
  config["hidden_size"] = a.hidden;
  config["num_hidden_layers"] = a.layers;
  config["num_attention_heads"] = a.heads;
  config["num_key_value_heads"] = a.kv_heads;
  config["head_dim"] = a.head_dim;
  config["intermediate_size"] = a.ffn;
  config["vocab_size"] = a.vocab;
  config["max_position_embeddings"] = a.max_positions;
  config["rope_theta"] = a.rope_theta;
  config["rms_norm_eps"] = a.rms_eps;
  config["tie_word_embeddings"] = a.tied;
  config["torch_dtype"] = long_name(a.dtype);
  config["attention_bias"] = false;
  config["hidden_act"] = "silu";
  config["rope_scaling"] = nullptr;
  config["sliding_window"] = nullptr;
  config["use_sliding_window"] = false;
  config["max_window_layers"] = a.layers;
  const json defaults = {{"attention_dropout", 0.0}, {"initializer_range", 0.02}, {"use_cache", true}};
  for (const auto& [key, value] : defaults.items()) {
    if (!config.contains(key)) config[key] = value;
  }
  if (!a.is_moe()) return config;
  config["num_experts"] = a.experts;
  config["num_experts_per_tok"] = a.top_k;
  config["moe_intermediate_size"] = a.expert_ffn;
  config["norm_topk_prob"] = a.renormalise;
  config["decoder_sparse_step"] = a.sparse_step;
  config["mlp_only_layers"] = std::vector<int64_t>(a.dense_layers.begin(), a.dense_layers.end());
  config["output_router_logits"] = false;
  config["router_aux_loss_coef"] = 0.001;
  return config;
}

std::vector<std::string> differences(const Architecture& here, const Architecture& there) {
  // Compared in the words of config.json, so that a line can be looked up in either file.
  const json ours = to_hf(here, {}), theirs = to_hf(there, {});
  std::vector<std::string> lines;
  json keys = ours;
  keys.update(theirs);
  for (const auto& [key, unused] : keys.items()) {
    if (key == "torch_dtype" || key == "architectures" || key == "max_window_layers") continue;
    const std::string a = ours.contains(key) ? ours[key].dump() : "absent",
                      b = theirs.contains(key) ? theirs[key].dump() : "absent";
    if (a != b) lines.push_back(key + ": " + a + " here, " + b + " there");
  }
  return lines;
}

}  // namespace upcycle
