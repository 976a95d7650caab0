#include "train/several_sources.hpp"

#include <algorithm>
#include <optional>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/text_file.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

std::optional<std::string> tokenizer_of(const WeightSource& source) {
  for (const fs::path& path : source.tokenizer_files()) {
    if (path.filename() != "tokenizer.json") continue;
    std::string content = text_of(path);
    const nlohmann::json json = nlohmann::json::parse(content, nullptr, false);   // spaces are no difference
    return json.is_discarded() ? content : json.dump();
  }
  return std::nullopt;
}

/// Tensor files, in the order of their names.
std::vector<fs::path> tensor_files(const fs::path& folder) {
  std::vector<fs::path> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string ending = entry.path().extension().string();
    if (ending == ".safetensors" || ending == ".h5") out.push_back(entry.path());
  }
  std::sort(out.begin(), out.end());
  return out;
}

bool same_content(const fs::path& a, const fs::path& b) {
  if (fs::file_size(a) != fs::file_size(b)) return false;
  const MappedFile first(a), other(b);
  return std::ranges::equal(first.bytes(), other.bytes());
}

}  // namespace

void check_same_kind(const WeightSource& first, const WeightSource& other) {
  std::vector<std::string> lines = differences(first.architecture(), other.architecture());
  const auto here = tokenizer_of(first), there = tokenizer_of(other);
  if (here.has_value() != there.has_value()) {
    lines.push_back(text("tokenizer.json: ", here ? "" : "not ", "here, ", there ? "" : "not ", "there"));
  } else if (here != there) {
    lines.push_back("tokenizer.json: another content");
  }
  if (lines.empty()) return;
  fail("source.models: ", first.folder().string(), " (here) and ", other.folder().string(), " (there) are no models of one shape:", listed(lines));
}

bool same_bytes(const WeightSource& first, const WeightSource& other) {
  std::error_code none;
  if (fs::equivalent(first.folder(), other.folder(), none)) return true;
  const std::vector<fs::path> here = tensor_files(first.folder()), there = tensor_files(other.folder());
  return std::ranges::equal(here, there, [](const fs::path& a, const fs::path& b) { return a.filename() == b.filename() && same_content(a, b); });
}

}  // namespace upcycle
