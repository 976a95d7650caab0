#pragma once
#include <filesystem>

#include "config/run_config.hpp"

namespace upcycle {

/// The directory of a run: checkpoints/, metrics.jsonl, run.toml (the resolved run of its last start).

/// Throws UserError when `directory` is none, can't be written, or holds files and is no run's. Writes nothing. Whether the run in it is the
/// one that is asked for its checkpoints tell: see resume.hpp.
void check_run_directory(const std::filesystem::path& directory);

/// Makes the directory and writes run.toml, durably.
void claim_run_directory(const std::filesystem::path& directory, const RunConfig&);

/// Bytes on the disk that the files in `folder` take, none where there is no such folder: what an interrupted attempt has taken already.
uint64_t room_taken(const std::filesystem::path& folder);

}  // namespace upcycle
