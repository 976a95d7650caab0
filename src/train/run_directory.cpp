#include "train/run_directory.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "checkpoint/durable.hpp"

namespace upcycle {
namespace {

constexpr const char* kRunFile = "run.toml";

}  // namespace

void check_run_directory(const std::filesystem::path& directory) {
  namespace fs = std::filesystem;
  const fs::path place = existing_part(directory);
  if (!fs::is_directory(place)) fail("run.directory = ", directory.string(), ": ", place.string(), " is not a directory");
  // What can't be written, the first save would meet, at the price of the steps before it.
  for (const fs::path& written : {place, directory / "checkpoints"}) {
    std::error_code unknown;   // what is no directory is told where checkpoints are looked for
    if (fs::is_directory(written, unknown) && ::access(written.c_str(), W_OK | X_OK) != 0) fail_with_errno("writing into", written);
  }
  if (!fs::exists(directory)) return;
  if (fs::exists(directory / kRunFile)) return;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().filename() == "lock" || entry.path().filename() == "save") continue;
    fail("run.directory = ", directory.string(), " holds ", entry.path().filename().string(), " and no ", kRunFile,
         ": it is not a run's directory. Choose another one, or empty it");
  }
}

void claim_run_directory(const std::filesystem::path& directory, const RunConfig& config) {
  make_directories(directory / "checkpoints");
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
