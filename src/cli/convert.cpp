#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/command.hpp"
#include "config/run_config.hpp"
#include "parallel/mesh.hpp"
#include "train/convert.hpp"

namespace upcycle {

int run_convert(const Arguments& arguments) {
  const RunConfig config = read_run(arguments.positional.at(0), arguments.set);   // 1. read the run
  const Mesh mesh(Grid({}, world_size()));                                        // 2. any number of ranks, each a share of the rows
  const auto folder = convert_to_checkpoint(config, mesh.world());                // 3. check everything, then write
  if (mesh.world().rank() != 0) return kExitDone;
  if (arguments.json) {
    std::cout << nlohmann::json{{"checkpoint", folder.string()}}.dump(2) << std::endl;
  } else {
    log::info("wrote " + folder.string());
  }
  return kExitDone;
}

}  // namespace upcycle
