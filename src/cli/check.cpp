#include "cli/check.hpp"

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/lines.hpp"
#include "cli/check_parts.hpp"
#include "config/suggest.hpp"
#include "train/layout_check.hpp"
#include "train/one_run.hpp"

namespace upcycle {
namespace {

CheckReport check_all(const Communicator& world, const Arguments& arguments) {
  const Stopwatch since;
  Check check{.world = world, .arguments = arguments};
  find_nodes(check);
  read_run_file(check);
  if (check.config) {
    open_inputs(check);
    find_devices(check);
    plan_memory(check);
    compare_room(check);
    measure_disks(check);
    compare_time(check);
    if (check.device) measure_links(check);
  }
  tell_bindings(check);
  check.report.seconds = since.seconds();
  return std::move(check.report);
}

[[noreturn]] void refuse(const std::string& run_file, const std::vector<std::string>& problems) {
  fail(run_file, " can't be started here:", listed(problems));
}

/// "run.directory" of a run's JSON.
nlohmann::json value_of(const RunConfig& config, const std::string& key) {
  std::vector<std::string> keys;
  const auto sections = nlohmann::ordered_json::parse(to_json(config));
  for (const auto& [section, values] : sections.items()) {
    for (const auto& [name, value] : values.items()) {
      keys.push_back(section + "." + name);
      if (keys.back() == key) return value;
    }
  }
  fail("--print ", key, ": a run file has no such key", did_you_mean(key, keys));
}

/// What Slurm says of this job in its environment; 0: nothing.
int64_t from_slurm(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : 0;
}

}  // namespace

int run_check(const Arguments& arguments) {
  const Communicator world = Communicator::everyone();
  const CheckReport report = check_all(world, arguments);
  if (world.rank() == 0) std::cout << (arguments.json ? to_json(report).dump(2) + "\n" : to_text(report)) << std::flush;
  if (!report.problems.empty()) refuse(arguments.positional.at(0), report.problems);
  return kExitDone;
}

int run_check_here(const Arguments& arguments) {
  const RunConfig config = read_run(arguments.positional.at(0), arguments.set);
  if (arguments.check.print) {
    const nlohmann::json value = value_of(config, *arguments.check.print);
    std::cout << (value.is_string() && !arguments.json ? value.get<std::string>() : value.dump()) << "\n";
    return kExitDone;
  }
  const int64_t tasks = from_slurm("SLURM_NTASKS");
  refuse_more_tasks_than_gpus(config, tasks, std::max<int64_t>(1, from_slurm("SLURM_NNODES")), from_slurm("SLURM_GPUS_ON_NODE"));
  check_inputs(config, static_cast<int>(tasks > 0 ? tasks : smallest_world(config.parallel)));
  return kExitDone;
}

}  // namespace upcycle
