#include <csignal>
#include <memory>
#include <optional>

#include "base/fault.hpp"
#include "base/log.hpp"
#include "cli/command.hpp"
#include "cli/roll_call.hpp"
#include "parallel/mesh.hpp"

int main(int argc, char** argv) {
  using namespace upcycle;
  std::signal(SIGXFSZ, SIG_IGN);   // a write beyond `ulimit -f` then fails like one on a full disk, and is explained
  std::optional<MpiSession> mpi;
  std::unique_ptr<RollCall> roll_call;
  try {
    const Arguments arguments = parse_arguments(argc, argv);
    roll_call = call_roll(arguments);
    if (needs_mpi(arguments)) mpi.emplace(&argc, &argv);
    log::start(arguments.level, world_rank());
    return run_command(arguments);
  } catch (const UserError& error) {
    return explain_mistake(error);
  } catch (const std::filesystem::filesystem_error& error) {
    return explain_mistake(mistake_of(error));
  } catch (const std::exception& error) {
    return explain_fault(error);
  }
}
