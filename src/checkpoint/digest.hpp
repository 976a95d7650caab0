#pragma once
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

#include "checkpoint/tensor_spec.hpp"

namespace upcycle {

/// XXH3-128 of bytes, canonical, in hex.
std::string digest_of(std::string_view bytes);

/// Of one kind of tensor, whatever files it lies in: of name, dtype and shape of every tensor, in the order of the names, and the
/// checksums of its blocks. Two checkpoints of the same state have the same digests, however they were laid out and written.
std::string digest_of(std::span<const TensorSpec> specs, std::span<const uint64_t> checksums);

/// Of a whole checkpoint's tensors: of what the manifest's `tensors` says of each kind.
std::string digest_of_tensors(const nlohmann::json& tensors);

}  // namespace upcycle
