#pragma once
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/reader.hpp"

namespace upcycle {

/// The checkpoint that `path` is, or the newest valid one of the run that it is. Throws UserError with what was looked at, and why it
/// was refused.
std::filesystem::path find_checkpoint(const std::string& path);

/// Prints what is in a checkpoint: at a glance, with `tensors` every tensor in a line of its own instead of one line for all layers; or all
/// of it as JSON. Reads no values.
void inspect_checkpoint(const std::filesystem::path& checkpoint, bool tensors, bool json);

/// How a model grew, in one line: what `provenance` has under "recipe".
std::string describe_recipe(const nlohmann::json& provenance, bool of_mixture);
/// "passed (expected: exact)", of a certificate.json; "none" of null.
std::string describe_certificate(const nlohmann::ordered_json& certificate);
/// The content of the checkpoint's certificate.json; null where it has none, "unreadable" where it is no JSON.
nlohmann::ordered_json certificate_in(const std::filesystem::path& checkpoint);

/// XXH3-128 over name, dtype, shape and the checksums of a tensor's blocks; "none" in files of schema version 1. Reads no values.
std::string checksum_of(const CheckpointReader&, const std::string& file, const std::string& name);
/// "float32", "bfloat16", "int64".
const char* word_for(at::ScalarType dtype);
/// "model.layers.17.mlp.down_proj.weight" -> "model.layers.*.mlp.down_proj.weight".
std::string with_stars(const std::string& name);
/// JSON as text, whatever bytes are in its strings.
std::string printable(const nlohmann::ordered_json&, int indent = -1);

}  // namespace upcycle
