#include "train/run_directory.hpp"

#include "base/error.hpp"
#include "checkpoint/durable.hpp"

namespace upcycle {
namespace {

constexpr const char* kRunFile = "run.toml";

}  // namespace

void check_run_directory(const std::filesystem::path& directory) {
  namespace fs = std::filesystem;
  if (!fs::exists(directory)) return;
  if (!fs::is_directory(directory)) fail("run.directory = ", directory.string(), " is not a directory");
  if (fs::exists(directory / kRunFile)) return;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().filename() == "lock") continue;
    fail("run.directory = ", directory.string(), " holds ", entry.path().filename().string(), " and no ", kRunFile,
         ": it is not a run's directory. Choose another one, or empty it");
  }
}

void claim_run_directory(const std::filesystem::path& directory, const RunConfig& config) {
  std::filesystem::create_directories(directory / "checkpoints");
  write_text_durably(directory / kRunFile, to_toml(config));
}

}  // namespace upcycle
