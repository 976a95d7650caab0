#include <unistd.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "base/process.hpp"
#include "checkpoint/durable.hpp"
#include "cli/check_parts.hpp"
#include "train/agreement.hpp"
#include "train/layout_check.hpp"
#include "train/run_directory.hpp"
#include "train/run_requests.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

void check_that_all_see_one_directory(Check& check) {
  if (check.report.nodes.size() < 2) return;
  const std::string& directory = check.config->run.directory;
  const fs::path probe = existing_part(directory) / check.world.broadcast(text(".upcycle-check-", host_name(), "-", ::getpid()), 0);
  if (check.world.rank() == 0) std::ofstream(probe) << '\n';
  check.world.barrier();
  check.by_node("looking into the run directory", [&] {
    const auto latest = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (check.speaks() && !fs::exists(probe)) {
      if (std::chrono::steady_clock::now() > latest) {
        fail("run.directory = ", directory, " is not the same directory here and on ", check.report.nodes.front().host, ": choose one of a file ",
             "system that all nodes share");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  });
  std::error_code none;
  if (check.world.rank() == 0) fs::remove(probe, none);
}

}  // namespace

Setup check_inputs(const RunConfig& config, int ranks) {
  refuse_stop_file(config.run.directory);
  return prepare_run(config, ranks, false);
}

void read_run_file(Check& check) {
  const std::string& path = check.arguments.positional.at(0);
  RunConfig read;
  if (!check.by_node("reading the run file", [&] { read = read_run(path, check.arguments.set); })) return;
  check.config.emplace(std::move(read));
  try {
    read_agreed_run(check.world, path, check.arguments.set);
  } catch (const UserError& error) {   // the same on all ranks
    check.report.problems.push_back(error.what());
  }
}

void open_inputs(Check& check) {
  const int ranks = check.world.size();
  if (check.by_node("reading what the run file names", [&] { check.setup.emplace(check_inputs(*check.config, ranks)); })) {
    check.report.layout = describe(Grid(check.config->parallel, ranks));
  } else {
    check.setup.reset();
  }
  check_that_all_see_one_directory(check);
}

}  // namespace upcycle
