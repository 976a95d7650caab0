#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

#include "checkpoint/safetensors.hpp"

namespace upcycle {

/// Longest header that is read, as in the reference implementation.
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;

/// Deepest JSON that is read: copying and printing a value takes stack for every level.
inline constexpr int kDeepestJson = 100;

/// Parses JSON; throws UserError "<where>: ..." when it isn't JSON, is nested deeper than kDeepestJson, or an object names a key twice
/// (most parsers keep one of them).
nlohmann::json parse_json(std::string_view text, const std::string& where);

/// "F32" etc. for every dtype that safetensors files of this program may hold; throws UserError naming `where` on
/// others.
at::ScalarType safetensors_dtype(const std::string& name, const std::string& where);
std::string safetensors_dtype_name(at::ScalarType dtype);

/// The tensors of one .safetensors file, offsets made absolute. Checks everything that a header can lie about; throws
/// UserError naming `where` (the file) and the tensor.
std::map<std::string, SafetensorsEntry> parse_safetensors(std::span<const std::byte> file, const std::string& where);

}  // namespace upcycle
