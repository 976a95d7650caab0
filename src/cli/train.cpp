#include "base/error.hpp"
#include "cli/command.hpp"
#include "config/run_config.hpp"
#include "parallel/mesh.hpp"
#include "train/run.hpp"

namespace upcycle {

int run_train(const Arguments& arguments) {
  const RunConfig config = read_run(arguments.positional.at(0), arguments.set);   // 1. read the run, all mistakes at once
  const std::vector<std::string> missing = not_built(config);
  if (!missing.empty()) {
    std::string lines;
    for (const std::string& line : missing) lines += "\n  " + line;
    fail(arguments.positional.at(0), " asks for what `train` can't do yet (`plan` understands it):", lines);
  }
  Mesh mesh(Grid(config.parallel, world_size()));                                 // 2. lay out the ranks
  return run_training(config, mesh);                                              // 3. build, restore or upcycle, train
}

}  // namespace upcycle
