#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace upcycle {

inline constexpr int kSchemaVersion = 1;

// The files of tensors that a checkpoint may hold; what is in each: checkpoint/writer.hpp.
inline constexpr const char* kWeightsFile = "weights.h5";
inline constexpr const char* kMastersFile = "masters.h5";
inline constexpr const char* kFirstMomentsFile = "exp_avg.h5";
inline constexpr const char* kSecondMomentsFile = "exp_avg_sq.h5";

/// What a checkpoint says of itself (manifest.json); see checkpoints-schema/. Sections that belong to other folders are JSON here.
struct Manifest {
  int schema_version = kSchemaVersion;
  std::string run_id;              ///< identity of the run that wrote it
  int64_t step = 0;
  nlohmann::json architecture;     ///< Hugging Face's config.json form
  nlohmann::json run;              ///< the resolved run
  nlohmann::json provenance;       ///< source files, recipe, versions, certificate's verdict
  nlohmann::json training;         ///< step, tokens, data position, optimizer's step count, skipped steps; empty for convert
  nlohmann::json layout;           ///< ranks and axes it was written on; information only
  nlohmann::json files;            ///< name -> size in bytes; filled by the writer
  nlohmann::json tensors;          ///< number of tensors and bytes per file; filled by the writer
};

/// Throws UserError naming the file for a missing or unreadable manifest and for an unknown schema version.
Manifest read_manifest(const std::filesystem::path& checkpoint);

/// The name of step n: "step-00000100".
std::string step_directory(int64_t step);

/// `path` itself when it is a step directory; else the newest valid step in `path`/checkpoints or `path`.
/// Valid: manifest.json is there and reads, and every file it lists has its size. Empty when there is none.
/// What was looked at and refused is told through `why` (one line each).
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& path, std::vector<std::string>* why = nullptr);

}  // namespace upcycle
