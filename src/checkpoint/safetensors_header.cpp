#include "checkpoint/safetensors_header.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <set>

#include "base/error.hpp"

namespace upcycle {
namespace {

using nlohmann::json;
static_assert(std::endian::native == std::endian::little, "safetensors and our HDF5 files are little-endian");

struct NamedDtype {
  const char* name;
  at::ScalarType dtype;
};
constexpr std::array kDtypes = {NamedDtype{"F32", at::kFloat}, NamedDtype{"BF16", at::kBFloat16},
                                NamedDtype{"F16", at::kHalf},  NamedDtype{"F64", at::kDouble},
                                NamedDtype{"I64", at::kLong},  NamedDtype{"I32", at::kInt},
                                NamedDtype{"I16", at::kShort}, NamedDtype{"I8", at::kChar},
                                NamedDtype{"U8", at::kByte},   NamedDtype{"BOOL", at::kBool}};

uint64_t natural(const json& value, const char* what, const std::string& where) {
  // Negative and fractional numbers, and those beyond 64 bits (which the parser turns into floats), are no offsets.
  if (!value.is_number_unsigned()) fail(where, ": ", what, " ", value.dump(), " is not a whole number >= 0 of 64 bits");
  return value.get<uint64_t>();
}

SafetensorsEntry parse_entry(const json& entry, const std::string& where) {
  if (!entry.is_object()) fail(where, ": its description is not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!entry.contains(key)) fail(where, ": '", key, "' is missing");
  }
  const json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  if (!dtype.is_string()) fail(where, ": dtype ", dtype.dump(), " is not a string");
  if (!shape.is_array()) fail(where, ": shape ", shape.dump(), " is not a list");
  if (!offsets.is_array() || offsets.size() != 2)
    fail(where, ": data_offsets ", offsets.dump(), " is not [begin, end]");

  SafetensorsEntry out;
  out.dtype = safetensors_dtype(dtype.get<std::string>(), where);
  const uint64_t width = c10::elementSize(out.dtype);
  uint64_t bytes = width;
  bool overflow = false;
  for (const json& size : shape) {
    const uint64_t extent = natural(size, "size in shape", where);
    overflow |= extent > INT64_MAX || __builtin_mul_overflow(bytes, extent, &bytes);
    out.shape.push_back(static_cast<int64_t>(extent));
  }
  if (overflow) fail(where, ": shape ", shape.dump(), " has more than 2^64 bytes");
  out.begin = natural(offsets[0], "offset", where);
  out.end = natural(offsets[1], "offset", where);
  if (out.begin > out.end) fail(where, ": data_offsets ", offsets.dump(), " end before they begin");
  if (out.end - out.begin != bytes) {
    fail(where, ": data_offsets ", offsets.dump(), " are ", out.end - out.begin, " bytes, but shape ",
         describe(out.shape), " of ", dtype.get<std::string>(), " takes ", bytes);
  }
  return out;
}

/// The tensors must tile the data without overlap and without holes, and the data must end with the file.
void check_tiling(const std::map<std::string, SafetensorsEntry>& entries, uint64_t data_bytes,
                  const std::string& where) {
  std::vector<std::pair<std::string, SafetensorsEntry>> sorted(entries.begin(), entries.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second.begin, a.second.end) < std::pair(b.second.begin, b.second.end);
  });
  uint64_t covered = 0;
  for (const auto& [name, entry] : sorted) {
    const std::string tensor = text(where, ": tensor '", name, "'");
    if (entry.end > data_bytes) {
      fail(tensor, " ends at byte ", entry.end, " of the data, but the file holds only ", data_bytes, ": truncated?");
    }
    if (entry.begin < covered)
      fail(tensor, " begins at byte ", entry.begin, ", inside the tensor before it, which ends at ", covered);
    if (entry.begin > covered)
      fail(tensor, " begins at byte ", entry.begin, ", which leaves a hole after byte ", covered);
    covered = entry.end;
  }
  if (covered != data_bytes) fail(where, ": ", data_bytes - covered, " bytes after the last tensor belong to none");
}

}  // namespace

at::ScalarType safetensors_dtype(const std::string& name, const std::string& where) {
  for (const auto& [known, dtype] : kDtypes) {
    if (name == known) return dtype;
  }
  fail(where, ": unknown dtype '", name, "' (F32, BF16, F16, F64, I64, I32, I16, I8, U8 and BOOL are read)");
}

std::string safetensors_dtype_name(at::ScalarType dtype) {
  for (const auto& [name, known] : kDtypes) {
    if (dtype == known) return name;
  }
  throw std::logic_error(text("no safetensors name for ", c10::toString(dtype)));
}

json parse_json(std::string_view text_, const std::string& where) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kDeepestJson) fail(where, ": nested deeper than ", kDeepestJson, " levels");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second) {
      fail(where, ": '", parsed.get<std::string>(), "' is there twice");
    }
    return true;
  };
  try {
    return json::parse(text_, check);
  } catch (const json::exception& error) {
    fail(where, ": not valid JSON (", error.what(), ")");
  }
}

std::map<std::string, SafetensorsEntry> parse_safetensors(std::span<const std::byte> file, const std::string& where) {
  uint64_t length = 0;
  if (file.size() < sizeof length)
    fail(where, ": ", file.size(), " bytes are too few for a safetensors file: truncated?");
  std::memcpy(&length, file.data(), sizeof length);
  if (length > kMaxSafetensorsHeader) {
    fail(where, ": says its header has ", length, " bytes; more than ", kMaxSafetensorsHeader,
         " are not read (is this a safetensors file?)");
  }
  if (length > file.size() - sizeof length) {
    fail(where, ": says its header has ", length, " bytes, but the file has only ", file.size(), ": truncated?");
  }
  const std::string_view header(reinterpret_cast<const char*>(file.data()) + sizeof length, length);
  const json tensors = parse_json(header, where + ": header");
  if (!tensors.is_object()) fail(where, ": the header is not a JSON object");

  std::map<std::string, SafetensorsEntry> entries;
  for (const auto& [name, entry] : tensors.items()) {
    if (name == "__metadata__") {
      const auto is_text = [](const json& value) { return value.is_string(); };
      if (!entry.is_object() || !std::all_of(entry.begin(), entry.end(), is_text))
        fail(where, ": __metadata__ does not map text to text");
      continue;
    }
    entries.emplace(name, parse_entry(entry, text(where, ": tensor '", name, "'")));
  }
  const uint64_t data_begin = sizeof length + length;
  check_tiling(entries, file.size() - data_begin, where);
  for (auto& [name, entry] : entries) {
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  return entries;
}

}  // namespace upcycle
