#pragma once
#include <filesystem>

#include "checkpoint/reader.hpp"
#include "checkpoint/safetensors.hpp"
#include "config/architecture.hpp"
#include "model/hf_names.hpp"

namespace upcycle {

/// How `files` spells the experts of `spec`.
ExpertForm expert_form(const ParameterSpec& spec, const SafetensorsReader& files);

/// Throws one UserError that lists every missing, surplus, wrong-shape and wrong-dtype tensor of `folder`. A stored dtype is right
/// when it is the config's, or fp32. A tied model's lm_head.weight must equal its embedding.
void check_tensors(const Architecture&, const SafetensorsReader& files, const std::filesystem::path& folder);
void check_tensors(const Architecture&, const CheckpointReader&);

}  // namespace upcycle
