#include "base/process.hpp"
#include "base/watchdog.hpp"
#include "cli/command.hpp"
#include "cli/or_abort.hpp"
#include "cli/version.hpp"
#include "config/run_config.hpp"
#include "device/nsight.hpp"
#include "parallel/mesh.hpp"
#include "parallel/nccl.hpp"
#include "train/agreement.hpp"
#include "train/run.hpp"

namespace upcycle {
int run_train(const Arguments& arguments) {
  const Communicator world = Communicator::everyone();
  const RunConfig config = read_agreed_run(world, arguments.positional.at(0), arguments.set);   // 1. one run, all mistakes at once
  std::string line = "upcycle " + version();
  for (const std::string& transport : transports_built_in()) line += ", " + transport;
  log::info(line);
  Watchdog watchdog(world.rank(), gather_processes(world), config.timeout_seconds(), nccl::abort_all);   // 2. nobody waits for the dead
  device::show_ranges_to_nsight();
  Mesh mesh(Grid(config.parallel, world_size()));                                                        // 3. lay out the ranks
  const int code = or_abort_nccl([&] { return run_training(config, mesh, watchdog, arguments.accept_changes, arguments.profile); });   // 4. build, restore or upcycle, train
  world.barrier();
  end_within(60, kExitFault);   // all are here; yet one may die while MPI shuts down
  return code;
}

}  // namespace upcycle
