#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "config/architecture.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

struct ExportOptions {
  std::optional<at::ScalarType> dtype;             ///< default: the source model's
  uint64_t max_shard_bytes = 5'000'000'000;
  bool dense = false;                              ///< merges a mixture that was grown back into a dense model, see upcycle/merge.hpp
};

struct ExportReport {
  std::filesystem::path checkpoint;                ///< the step directory that was read
  std::string architecture;                        ///< "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
  at::ScalarType dtype = at::kBFloat16;
  int64_t tensors = 0;
  uint64_t bytes = 0;
};

/// **Collective** over `world`. Writes a checkpoint (a step directory, or a run directory: its newest valid step) as a Hugging Face directory that transformers
/// and vLLM load: safetensors with per-expert names, config.json, tokenizer and generation files, upcycling.json (provenance).
/// Values come from the fp32 masters where there are some. All goes to <directory>.partial and is renamed at the end. Each rank writes
/// blocks of its own and holds one at a time. What an interrupted export of the same checkpoint with the same options left there is
/// verified and kept; the result does not depend on it, nor on the number of ranks.
/// Throws UserError for a directory that holds files, for too little space, for damaged checkpoints, and, by name, for what the
/// target cannot express: a balancing bias, dropped tokens (a dense target has no routers, and takes both). For options.dense also for a
/// model that is dense already, and for a mixture that no recipe says the way back of.
ExportReport export_to_hf(const std::filesystem::path& checkpoint, const std::filesystem::path& directory, const ExportOptions&,
                          const Communicator& world);

/// "5GB", "500MB", "2GiB", "1000000": bytes. Throws UserError on others.
uint64_t bytes_from_text(const std::string& size);

}  // namespace upcycle
