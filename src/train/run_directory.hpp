#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// The directory of a run: checkpoints/, metrics.jsonl, run.toml (the resolved run, which tells whose directory it is).

/// The keys in which two runs differ and which make them different runs: what is trained, on what, how. Layout, lengths, intervals
/// and micro-batches may change between a stop and a resume. One line each: "train.global_batch: 48 there, 96 here".
std::vector<std::string> other_run(const RunConfig& there, const RunConfig& here);

/// Throws UserError when `directory` belongs to another run (naming the keys), or holds files that are no run's. Writes nothing.
void check_run_directory(const std::filesystem::path& directory, const RunConfig&);

/// Makes the directory and writes run.toml, durably.
void claim_run_directory(const std::filesystem::path& directory, const RunConfig&);

/// Bytes on the disk that the files in `folder` take, none where there is no such folder: what an interrupted attempt has taken already.
uint64_t room_taken(const std::filesystem::path& folder);

}  // namespace upcycle
