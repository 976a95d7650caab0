#pragma once
#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "checkpoint/reader.hpp"
#include "config/run_config.hpp"

namespace upcycle {

/// What a run goes on from, and whether that is what its file asks for. Nothing here writes.

/// The newest valid checkpoint of the run directory; nothing in one where no run has been. What was looked at and refused is told in the
/// log where `speaks`. Throws UserError where starting again from the source would leave something behind without a word: checkpoints
/// that are all damaged, of another schema version or not to be read, or gone, though metrics.jsonl tells of a run.
std::optional<std::filesystem::path> find_resume(const RunConfig&, bool speaks);

/// Holds the run file against `resume`: architecture and vocabulary (config.json's fields), recipe, all keys of the run that decide what is
/// computed (run_changes.hpp), tokenizer files. Throws one UserError that lists every difference with both values and says what to do.
/// Another model can't be gone on to; all else can with `accept_changes`: then the list goes to the log, where `speaks`.
void refuse_other_run(const RunConfig&, const CheckpointReader& resume, bool accept_changes, bool speaks);

/// The small files of a checkpoint, by name: all that hold no tensors.
std::map<std::string, std::string> texts_of(const CheckpointReader&);

}  // namespace upcycle
