#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace upcycle {

inline constexpr int kSchemaVersion = 3;   ///< that is written; older ones are read
/// True for the schema versions that this program reads.
constexpr bool reads_schema(int64_t version) { return 1 <= version && version <= kSchemaVersion; }
inline constexpr const char* kManifestFile = "manifest.json";

// The files of tensors that a checkpoint may hold; what is in each: checkpoint/writer.hpp.
inline constexpr const char* kWeightsFile = "weights.h5";
inline constexpr const char* kMastersFile = "masters.h5";
inline constexpr const char* kFirstMomentsFile = "exp_avg.h5";
inline constexpr const char* kSecondMomentsFile = "exp_avg_sq.h5";

/// What a checkpoint says of itself (manifest.json); see checkpoints-schema/. Sections that belong to other folders are
/// JSON here.
struct Manifest {
  int schema_version = kSchemaVersion;
  std::string run_id;  ///< identity of the run that wrote it
  int64_t step = 0;
  nlohmann::json architecture;  ///< Hugging Face's config.json form
  nlohmann::json run;           ///< the resolved run
  nlohmann::json provenance;    ///< source files, recipe, versions, certificate's verdict
  nlohmann::json training;  ///< step, tokens, data position, optimizer's step count, skipped steps; empty for convert
  nlohmann::json layout;    ///< ranks and axes it was written on; information only
  nlohmann::json files;     ///< name -> size in bytes; filled by the writer
  nlohmann::json texts = nlohmann::json::object();   ///< name -> digest of each file without tensors; filled by the writer
  nlohmann::json tensors;   ///< number of tensors, bytes, digest (and parts) per kind of tensor; filled by the writer
};

nlohmann::json to_json(const Manifest&);
/// manifest.json's content: to_json, and the digest of that.
std::string to_text(const Manifest&);
/// The i-th (from 1) of n files that weights.h5 is divided into: "weights-00001-of-00003.h5".
std::string part_name(const std::string& file, size_t i, size_t n);

/// Throws UserError naming the file for a missing or unreadable manifest, for an unknown schema version (with those
/// that this program reads), and for one that is not what was written.
Manifest read_manifest(const std::filesystem::path& checkpoint);

/// Throws UserError naming the file when one that `manifest` lists is missing, has another size, or, where it holds no tensors, another
/// content (in schema versions 1 and 2 only sizes are known).
void check_complete(const std::filesystem::path& checkpoint, const Manifest& manifest);

/// The name of step n: "step-00000100".
std::string step_directory(int64_t step);
/// n for the name of step n, nothing for other names.
std::optional<int64_t> step_of(const std::string& directory_name);

/// `path` itself when it holds a manifest; else the newest valid step in `path`/checkpoints or `path`.
/// Valid: manifest.json is there and reads, and check_complete finds nothing. Empty when there is none.
/// What was looked at and refused is told through `why` (one line each).
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& path,
                                                       std::vector<std::string>* why = nullptr);

/// The valid steps of `checkpoints` (a folder of steps) before step `before`, newest first.
std::vector<std::filesystem::path> valid_checkpoints(const std::filesystem::path& checkpoints, int64_t before);

/// The one of `checkpoints` whose `training` tells of the lowest validation_loss; the newer of equals. Empty when none
/// of them tells one.
std::optional<std::filesystem::path> best_checkpoint(const std::vector<std::filesystem::path>& checkpoints);

/// Removes steps of `checkpoints` but the newest `keep` valid ones (at least one), where keep_every > 0 those whose
/// number it divides, and with `keep_best` the best_checkpoint. What is damaged is no checkpoint and stays. Returns
/// what was removed. For one rank alone.
std::vector<std::filesystem::path> remove_old(const std::filesystem::path& checkpoints, int64_t keep,
                                              int64_t keep_every, bool keep_best = false);

/// Removes the valid steps of `checkpoints` after step `step`: those of a way that a run took back. Returns what was
/// removed. For one rank alone.
std::vector<std::filesystem::path> remove_after(const std::filesystem::path& checkpoints, int64_t step);

/// Renames a damaged checkpoint, durably, to <checkpoint>.damaged-N, the first such name that is free; returns it. It
/// is out of the way of a new one, and not ours to delete. For one rank alone.
std::filesystem::path set_aside(const std::filesystem::path& checkpoint);

}  // namespace upcycle
