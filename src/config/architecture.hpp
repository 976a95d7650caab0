#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <vector>

namespace upcycle {

/// What a Qwen3 or Qwen3-MoE model is: the numbers of Hugging Face's config.json that decide its function, nothing else.
struct Architecture {
  int64_t hidden = 0;      ///< hidden_size
  int64_t layers = 0;      ///< num_hidden_layers
  int64_t heads = 0;       ///< num_attention_heads
  int64_t kv_heads = 0;    ///< num_key_value_heads
  int64_t head_dim = 0;    ///< head_dim; not hidden / heads in general
  int64_t ffn = 0;         ///< intermediate_size, the width of a dense feed-forward
  int64_t vocab = 0;       ///< vocab_size
  int64_t max_positions = 40960;
  double rope_theta = 1e6;
  double rms_eps = 1e-6;
  bool tied = false;       ///< tie_word_embeddings
  at::ScalarType dtype = at::kBFloat16;  ///< the dtype that weights are stored in at the Hugging Face border

  // Mixture of experts; experts == 0 means a dense model (Qwen3ForCausalLM).
  int64_t experts = 0;     ///< num_experts, N
  int64_t top_k = 0;       ///< num_experts_per_tok, K
  int64_t expert_ffn = 0;  ///< moe_intermediate_size
  bool renormalise = true; ///< norm_topk_prob
  int64_t sparse_step = 1; ///< decoder_sparse_step
  std::set<int64_t> dense_layers;  ///< mlp_only_layers

  bool operator==(const Architecture&) const = default;

  bool is_moe() const { return experts > 0; }
  /// HF's rule: layer i has experts iff i is not in mlp_only_layers and (i + 1) % decoder_sparse_step == 0.
  bool is_moe_layer(int64_t layer) const {
    return is_moe() && !dense_layers.contains(layer) && (layer + 1) % sparse_step == 0;
  }
  int64_t num_moe_layers() const;
};

/// Reads a config.json of Qwen3ForCausalLM or Qwen3MoeForCausalLM as the hub, transformers 4.57 and transformers 5 write it
/// (num_experts or num_local_experts, rope_theta or rope_parameters, torch_dtype or dtype).
/// Throws UserError naming file and key for another architecture and for what this program can't express:
/// sliding windows, rope scaling, attention bias, another activation.
Architecture read_architecture(const std::filesystem::path& config_json);
Architecture architecture_from_hf(const nlohmann::json& config, const std::string& where);

/// The hub's form of config.json, which transformers 4.57 and 5 and vLLM all read. `extra` (the source's own config) gives the
/// keys that do not describe the function (bos_token_id, initializer_range, ...); keys of this struct win.
nlohmann::json to_hf(const Architecture&, const nlohmann::json& extra);

/// One line for every field in which they differ ("hidden_size: 1024 here, 2048 there"); empty when equal. dtype is left out.
std::vector<std::string> differences(const Architecture& here, const Architecture& there);

}  // namespace upcycle
