#include <filesystem>

#include "base/error.hpp"
#include "cli/command.hpp"
#include "cli/compare.hpp"
#include "cli/inspect_checkpoint.hpp"
#include "cli/inspect_data.hpp"
#include "data/summary.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

int run_inspect(const Arguments& arguments) {
  namespace fs = std::filesystem;
  if (world_rank() != 0) return kExitDone;
  const std::string& what = arguments.positional.at(0);
  const bool directory = fs::is_directory(what);   // a checkpoint is one; token files are two files
  const std::optional<std::string> prefix = data_prefix(what);
  if (directory && prefix) {
    fail(what, " is a directory, and ", *prefix, ".idx is there, too: say ", *prefix, ".idx for the token files, ", what,
         "/ for the checkpoint");
  }
  if (prefix) {
    if (arguments.positional.size() > 1) fail(what, " are token files: two checkpoints, or two runs, are what can be compared");
    if (arguments.tensors) fail("--tensors is for checkpoints, but ", what, " are token files");
    inspect_data(*prefix, arguments.tokenizer, arguments.json);
    return kExitDone;
  }
  if (!directory) fail(what, ": neither the directory of a checkpoint or a run, nor token files (no ", what, ".idx)");
  if (arguments.tokenizer) fail("--tokenizer is for token files, but ", what, " is a directory");
  const fs::path checkpoint = find_checkpoint(what);
  if (arguments.positional.size() == 1) {
    inspect_checkpoint(checkpoint, arguments.tensors, arguments.json);
    return kExitDone;
  }
  const CheckpointReader a(checkpoint), b(find_checkpoint(arguments.positional[1]));
  const Comparison found = compare(a, b);
  print(found, arguments.tensors, arguments.json);
  return found.same() ? kExitDone : kExitFault;   // as diff says it
}

}  // namespace upcycle
