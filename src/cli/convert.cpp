#include <iostream>
#include <nlohmann/json.hpp>

#include "base/watchdog.hpp"
#include "cli/command.hpp"
#include "config/run_config.hpp"
#include "train/agreement.hpp"
#include "train/convert.hpp"

namespace upcycle {

int run_convert(const Arguments& arguments) {
  const Communicator world = Communicator::everyone();                            // any number of ranks, each a share of the blocks
  const RunConfig config = read_agreed_run(world, arguments.positional.at(0), arguments.set);   // 1. one run
  const Watchdog watchdog(world.rank(), gather_processes(world), config.timeout_seconds());     // 2. nobody waits for the dead
  const auto folder = convert_to_checkpoint(config, world);                       // 3. check everything, then write
  if (world.rank() != 0) return kExitDone;
  if (arguments.json) {
    std::cout << nlohmann::json{{"checkpoint", folder.string()}}.dump(2) << std::endl;
  } else {
    log::info("wrote " + folder.string());
  }
  return kExitDone;
}

}  // namespace upcycle
