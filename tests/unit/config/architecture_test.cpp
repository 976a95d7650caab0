#include "config/architecture.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace upcycle {
namespace {

using nlohmann::json;

json dense_config() {
  return json::parse(
      R"({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 96, "vocab_size": 512,
    "max_position_embeddings": 1024, "rope_theta": 1000000, "rms_norm_eps": 1e-06, "tie_word_embeddings": true,
    "torch_dtype": "float32", "hidden_act": "silu", "attention_bias": false, "sliding_window": null, "rope_scaling": null,
    "use_sliding_window": false, "max_window_layers": 4, "bos_token_id": 1, "eos_token_id": 2})");
}

json moe_config() {
  json config = dense_config();
  config.update(json::parse(R"({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": true, "decoder_sparse_step": 2, "mlp_only_layers": [3]})"));
  return config;
}

std::string problem(const json& config) {
  try {
    architecture_from_hf(config, "dir/config.json");
  } catch (const UserError& error) {
    return error.what();
  }
  return "no problem";
}

void expect_problem(json config, const json& change, const std::string& part) {
  config.update(change);
  EXPECT_NE(problem(config).find("dir/config.json: " + part), std::string::npos)
      << problem(config) << "\nexpected " << part;
}

TEST(Architecture, ReadsADenseModel) {
  const Architecture a = architecture_from_hf(dense_config(), "c");
  EXPECT_EQ(a.hidden, 64);
  EXPECT_EQ(a.head_dim, 128) << "not hidden / heads";
  EXPECT_EQ(a.kv_heads, 2);
  EXPECT_EQ(a.rope_theta, 1e6);
  EXPECT_TRUE(a.tied);
  EXPECT_EQ(a.dtype, at::kFloat);
  EXPECT_FALSE(a.is_moe());
  EXPECT_EQ(a.num_moe_layers(), 0);
}

TEST(Architecture, ReadsAMoeModelWithItsLayerPolicy) {
  const Architecture a = architecture_from_hf(moe_config(), "c");
  EXPECT_EQ(a.experts, 8);
  EXPECT_EQ(a.expert_ffn, 48);
  EXPECT_TRUE(a.renormalise);
  EXPECT_FALSE(a.is_moe_layer(0));
  EXPECT_TRUE(a.is_moe_layer(1));
  EXPECT_FALSE(a.is_moe_layer(3)) << "mlp_only_layers wins";
  EXPECT_EQ(a.num_moe_layers(), 1);
  json config = moe_config();
  config.erase("norm_topk_prob");
  EXPECT_FALSE(architecture_from_hf(config, "c").renormalise) << "transformers' default";
}

TEST(Architecture, ReadsTheFormOfTransformers5) {
  json config = moe_config();
  for (const char* key : {"num_experts", "rope_theta", "rope_scaling", "torch_dtype", "sliding_window"})
    config.erase(key);
  config["num_local_experts"] = 8;
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 1e6}};
  config["dtype"] = "float32";
  config["layer_types"] = json(4, "full_attention");
  EXPECT_EQ(architecture_from_hf(config, "c"), architecture_from_hf(moe_config(), "c"));
}

TEST(Architecture, RefusesOtherFunctionsByName) {
  const json d = dense_config();
  expect_problem(d, {{"model_type", "llama"}}, "model_type = \"llama\": only Qwen3ForCausalLM");
  expect_problem(d, {{"architectures", {"LlamaForCausalLM"}}},
                 "architectures = [\"LlamaForCausalLM\"]: only Qwen3ForCausalLM");
  expect_problem(d, {{"architectures", {"Qwen3MoeForCausalLM"}}},
                 "architectures = [\"Qwen3MoeForCausalLM\"] contradicts model_type = \"qwen3\"");
  expect_problem(d, {{"model_type", nullptr}, {"architectures", nullptr}}, "model_type is missing");
  expect_problem(d, {{"attention_bias", true}}, "attention_bias = true");
  expect_problem(d, {{"hidden_act", "gelu"}}, "hidden_act = \"gelu\": only silu");
  expect_problem(d, {{"quantization_config", {{"quant_method", "fp8"}}}}, "quantization_config is set");
  expect_problem(d, {{"use_sliding_window", true}, {"sliding_window", 32}, {"max_window_layers", 2}},
                 "use_sliding_window = true: sliding windows are in use");
  EXPECT_EQ(problem([&] {
              json c = d;
              c.update({{"use_sliding_window", true}, {"sliding_window", 32}});
              return c;
            }()),
            "no problem")
      << "windows from layer 4 on, of 4 layers: none";
  expect_problem(moe_config(), {{"use_sliding_window", true}, {"sliding_window", 32}}, "use_sliding_window = true");
  expect_problem(d, {{"layer_types", {"full_attention", "sliding_attention"}}},
                 "layer_types has \"sliding_attention\"");
  expect_problem(d, {{"layer_types", "full_attention"}}, "layer_types = \"full_attention\": a list is expected");
  expect_problem(d, {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}}},
                 "rope_scaling.rope_type = \"yarn\": rope scaling");
  expect_problem(d, {{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}}, "rope_scaling.type = \"linear\"");
  expect_problem(d, {{"rope_scaling", {{"factor", 4.0}}}}, "rope_scaling.factor is set");
  expect_problem(d, {{"rope_parameters", {{"rope_theta", 1e6}, {"partial_rotary_factor", 0.5}}}},
                 "rope_parameters.partial_rotary_factor = 0.5");
}

TEST(Architecture, NumbersAreReadStrictly) {
  const json d = dense_config();
  for (const json& wrong :
       {json("64"), json(-64), json(0), json(64.0), json(1e30), json(uint64_t{1} << 63), json(true), json::array()}) {
    expect_problem(d, {{"hidden_size", wrong}},
                   "hidden_size = " + wrong.dump() + ": an integer from 1 to 16777216 is expected");
  }
  expect_problem(d, {{"hidden_size", nullptr}}, "hidden_size is missing");
  expect_problem(d, {{"head_dim", nullptr}}, "head_dim is missing");
  expect_problem(d, {{"head_dim", 63}}, "head_dim = 63: RoPE turns pairs");
  expect_problem(d, {{"num_key_value_heads", 3}},
                 "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3");
  expect_problem(d, {{"rope_theta", nullptr}}, "rope_theta is missing");
  expect_problem(d, {{"rope_theta", "1e6"}}, "rope_theta = \"1e6\": a positive number is expected");
  expect_problem(d, {{"rope_parameters", {{"rope_theta", 5e6}}}},
                 "rope_parameters.rope_theta = 5e+06 contradicts rope_theta = 1e+06");
  expect_problem(d, {{"rope_parameters", 3}}, "rope_parameters: a JSON object is expected");
  expect_problem(d, {{"rms_norm_eps", 0}}, "rms_norm_eps = 0: a positive number");
  expect_problem(d, {{"tie_word_embeddings", 1}}, "tie_word_embeddings = 1: true or false");
  expect_problem(d, {{"torch_dtype", "int8"}}, "torch_dtype: unknown dtype 'int8'");
  expect_problem(d, {{"torch_dtype", 16}}, "torch_dtype = 16: a string is expected");
  const json m = moe_config();
  expect_problem(m, {{"num_local_experts", 4}}, "num_experts = 8 contradicts num_local_experts = 4");
  expect_problem(m, {{"num_experts", nullptr}}, "num_experts is missing");
  expect_problem(m, {{"num_experts_per_tok", 9}}, "num_experts_per_tok = 9 is more than the 8 experts");
  expect_problem(m, {{"mlp_only_layers", {4}}}, "mlp_only_layers has 4: layers are 0 to 3");
  expect_problem(m, {{"mlp_only_layers", 1}}, "mlp_only_layers = 1: a list is expected");
  EXPECT_NE(problem(json::array()).find("a JSON object is expected, this is array"), std::string::npos);
}

TEST(Architecture, WritesTheHubsFormAndReadsItBack) {
  for (const json& config : {dense_config(), moe_config()}) {
    const Architecture a = architecture_from_hf(config, "c");
    json extra = config;
    extra.update({{"num_local_experts", 4},
                  {"rope_parameters", {{"rope_theta", 5.0}}},
                  {"dtype", "float16"},
                  {"layer_types", {"x"}}});
    const json written = to_hf(a, extra);
    EXPECT_EQ(architecture_from_hf(written, "written"), a);
    EXPECT_EQ(written.at("eos_token_id"), 2) << "what does not describe the function is carried over";
    for (const char* key : {"num_local_experts", "rope_parameters", "dtype", "layer_types"})
      EXPECT_FALSE(written.contains(key)) << key;
    EXPECT_EQ(written.at("torch_dtype"), "float32");
    EXPECT_EQ(written.contains("num_experts"), a.is_moe());
    EXPECT_EQ(architecture_from_hf(to_hf(a, nullptr), "bare"), a);
  }
}

TEST(Architecture, DifferencesAreOneLineEach) {
  const Architecture dense = architecture_from_hf(dense_config(), "c");
  Architecture other = dense;
  EXPECT_TRUE(differences(dense, other).empty());
  other.dtype = at::kBFloat16;
  EXPECT_TRUE(differences(dense, other).empty()) << "dtype is left out";
  other.hidden = 128;
  other.rope_theta = 1e4;
  EXPECT_EQ(differences(dense, other),
            (std::vector<std::string>{"hidden_size: 64 here, 128 there", "rope_theta: 1000000.0 here, 10000.0 there"}));
  const auto moe = differences(dense, architecture_from_hf(moe_config(), "c"));
  EXPECT_NE(std::find(moe.begin(), moe.end(), "num_experts: absent here, 8 there"), moe.end());
}

TEST(Architecture, ShippedModelsAreRead) {
  const std::string models = UPCYCLE_SOURCE_DIR "/configs/models/qwen3-";
  for (const std::string size : {"0.6b", "1.7b", "4b", "8b", "14b", "32b"}) {
    const Architecture a = read_architecture(models + size + ".json");
    EXPECT_EQ(a.vocab, 151936);
    EXPECT_EQ(a.head_dim, 128);
    EXPECT_EQ(a.tied, size == "0.6b" || size == "1.7b" || size == "4b");
  }
}

TEST(Architecture, NamesUnreadableFiles) {
  const auto reading = [](const std::string& path) {
    try {
      read_architecture(path);
    } catch (const UserError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(reading("/nowhere/config.json"), "/nowhere/config.json: cannot be opened");
  EXPECT_NE(reading(UPCYCLE_SOURCE_DIR "/CMakeLists.txt").find("CMakeLists.txt: not valid JSON at byte 1"),
            std::string::npos);
}

}  // namespace
}  // namespace upcycle
