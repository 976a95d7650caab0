#include "train/run_directory.hpp"

#include <sys/stat.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "checkpoint/durable.hpp"

namespace upcycle {
namespace {

constexpr const char* kRunFile = "run.toml";

// Sections and keys that a resumed run may change.
bool may_change(const std::string& section, const std::string& key) {
  static const std::set<std::string> kSections = {"parallel", "checkpoint", "validate", "log"};
  static const std::set<std::string> kKeys = {"run.directory", "run.timeout", "run.transport", "run.device", "run.share_gpu", "run.signal",
                                              "train.steps", "train.micro_batch", "train.recompute", "train.nan_limit",
                                              "train.nan_policy", "upcycle.certify", "upcycle.certify_tokens",
                                              "source.architecture", "source.tokenizer", "moe.max_parameters", "moe.dispatcher",
                                              "balance.pad_to_capacity", "data.epochs"};
  return kSections.contains(section) || kKeys.contains(section + "." + key);
}

}  // namespace

std::vector<std::string> other_run(const RunConfig& there, const RunConfig& here) {
  const nlohmann::json a = nlohmann::json::parse(to_json(there)), b = nlohmann::json::parse(to_json(here));
  std::vector<std::string> lines;
  for (const auto& [section, keys] : b.items()) {
    for (const auto& [key, value] : keys.items()) {
      const nlohmann::json before = a.value(section, nlohmann::json::object()).value(key, nlohmann::json());
      if (before != value && !may_change(section, key)) {
        lines.push_back(text(section, ".", key, ": ", before.dump(), " there, ", value.dump(), " here"));
      }
    }
  }
  return lines;
}

void check_run_directory(const std::filesystem::path& directory, const RunConfig& config) {
  namespace fs = std::filesystem;
  if (!fs::exists(directory)) return;
  if (!fs::is_directory(directory)) fail("run.directory = ", directory.string(), " is not a directory");
  const fs::path run_file = directory / kRunFile;
  if (!fs::exists(run_file)) {
    for (const auto& entry : fs::directory_iterator(directory)) {
      if (entry.path().filename() == "lock") continue;
      fail("run.directory = ", directory.string(), " holds ", entry.path().filename().string(), " and no ", kRunFile,
           ": it is not a run's directory. Choose another one, or empty it");
    }
    return;
  }
  const std::vector<std::string> different = other_run(read_run(run_file.string()), config);
  if (different.empty()) return;
  std::string lines;
  for (const std::string& line : different) lines += "\n  " + line;
  fail("run.directory = ", directory.string(), " belongs to another run. These keys differ:", lines,
       "\nChoose another directory, or go back to the run file that made it (", run_file.string(), ")");
}

void claim_run_directory(const std::filesystem::path& directory, const RunConfig& config) {
  std::filesystem::create_directories(directory / "checkpoints");
  write_text_durably(directory / kRunFile, to_toml(config));
}

uint64_t room_taken(const std::filesystem::path& folder) {
  uint64_t bytes = 0;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(folder, none)) {
    struct stat status {};
    if (::stat(entry.path().c_str(), &status) == 0) bytes += static_cast<uint64_t>(status.st_blocks) * 512;
  }
  return bytes;
}

}  // namespace upcycle
