#include "cli/command.hpp"

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <thread>

#include "base/fault.hpp"
#include "parallel/mesh.hpp"
#include "train/agreement.hpp"

namespace upcycle {

int launched_rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"}) {
    if (const char* value = std::getenv(name)) return std::atoi(value);
  }
  return 0;
}

namespace {

int own_rank() { return world_size() > 1 ? world_rank() : launched_rank(); }

}  // namespace

bool needs_mpi(const Arguments& arguments) {
  return arguments.command != "help" && arguments.command != "version" && arguments.command != "plan" &&
         arguments.command != "sweep" && arguments.command != "watch" &&
         !(arguments.command == "check" && (arguments.check.files_only || arguments.check.print));
}

int run_command(const Arguments& arguments) {
  if (!arguments.output.empty()) {
    if (own_rank() == 0) std::cout << arguments.output;
    return kExitDone;
  }
  if (arguments.command == "plan") return own_rank() == 0 ? run_plan(arguments) : kExitDone;
  if (arguments.command == "sweep") return run_sweep(arguments);
  if (arguments.command == "watch") return own_rank() == 0 ? run_watch(arguments) : kExitDone;
  if (!needs_mpi(arguments)) return own_rank() == 0 ? run_check_here(arguments) : kExitDone;
  agree_on_program(Communicator::everyone(), arguments.command);
  if (arguments.command == "convert") return run_convert(arguments);
  if (arguments.command == "train") return run_train(arguments);
  if (arguments.command == "check") return run_check(arguments);
  if (arguments.command == "export") return run_export(arguments);
  if (arguments.command == "inspect") return run_inspect(arguments);
  if (arguments.command == "verify") return run_verify(arguments);
  if (arguments.command == "sample") return run_sample(arguments);
  if (arguments.command == "evaluate") return run_evaluate(arguments);
  throw std::logic_error("no command is called " + arguments.command);
}

int explain_mistake(const std::exception& error) {
  if (dynamic_cast<const LonelyMistake*>(&error)) {
    std::cerr << text("upcycle: rank ", own_rank(), ": ", error.what(), "\n") << std::flush;
    if (world_size() > 1) abort_all_ranks(kExitMistake);
    return kExitMistake;
  }
  if (own_rank() == 0) std::cerr << "upcycle: " << error.what() << std::endl;
  if (world_size() > 1) {
    // A mistake is met by all ranks alike. Should one be alone with it, the others would wait for it for ever.
    std::thread([what = std::string(error.what()), rank = world_rank()] {
      std::this_thread::sleep_for(std::chrono::seconds(30));
      std::cerr << "upcycle: rank " << rank << " is alone with: " << what << std::endl;
      abort_all_ranks(kExitMistake);
    }).detach();
  }
  return kExitMistake;
}

int explain_fault(const std::exception& error) {
  std::string what = error.what();
  what = what.substr(0, what.find("\nException raised from"));   // LibTorch appends its call stack, which helps no user
  const auto* common = dynamic_cast<const CommonFault*>(&error);
  if (common == nullptr) what = text("rank ", own_rank(), ": ", what);
  if (common == nullptr || common->speaks) {
    std::cerr << text("upcycle: ", what, "\n") << std::flush;
  } else {
    std::this_thread::sleep_for(std::chrono::seconds(2));   // the launcher kills the one who speaks as soon as another leaves
  }
  if (world_size() > 1) abort_all_ranks(kExitFault);
  return kExitFault;
}

}  // namespace upcycle
