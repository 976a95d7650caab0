#include <algorithm>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "base/cpu_binding.hpp"
#include "base/host_memory.hpp"
#include "base/process.hpp"
#include "cli/check_parts.hpp"
#include "cli/deadline.hpp"
#include "cli/roll_call.hpp"

namespace upcycle {

bool Check::by_node(const std::string& what, const std::function<void()>& action) {
  std::string mistake;
  try {
    const Deadline deadline(kPatience, text("node ", here().host, ", rank ", world.rank(), ": ", what, " takes more than ", kPatience, " s"), kExitMistake);
    action();
  } catch (const UserError& error) {
    mistake = error.what();
  }
  std::map<std::string, std::vector<int>> who;
  const std::vector<std::string> told = world.all_gather(mistake);
  RollCall::met();
  for (size_t rank = 0; rank < told.size(); ++rank) {
    if (!told[rank].empty()) who[told[rank]].push_back(static_cast<int>(rank));
  }
  for (const auto& [complaint, ranks] : who) {
    if (static_cast<int>(ranks.size()) == world.size()) {
      report.problems.push_back(text(report.nodes.size() > 1 ? "all nodes: " : "", complaint));
      continue;
    }
    for (const NodeCheck& node : report.nodes) {
      std::vector<int> those;
      std::set_intersection(node.ranks.begin(), node.ranks.end(), ranks.begin(), ranks.end(), std::back_inserter(those));
      if (!those.empty()) report.problems.push_back(text("node ", node.host, those == node.ranks ? "" : text(", rank ", ranges(those)), ": ", complaint));
    }
  }
  return who.empty();
}

void find_nodes(Check& check) {
  const Communicator& world = check.world;
  CheckReport& report = check.report;
  nlohmann::json mine = {{"host", host_name()}, {"cpus", bound_cpus()}, {"memory", available_host_memory()}};
  const std::vector<std::string> told = world.all_gather(mine.dump());
  RollCall::met();
  for (size_t rank = 0; rank < told.size(); ++rank) {
    const nlohmann::json one = nlohmann::json::parse(told[rank]);
    const std::string host = one["host"];
    report.ranks.push_back({host, one["cpus"].get<std::vector<int>>(), {}, {}});
    auto node = std::find_if(report.nodes.begin(), report.nodes.end(), [&](const NodeCheck& known) { return known.host == host; });
    if (node == report.nodes.end()) node = report.nodes.insert(node, NodeCheck{host, {}, one["memory"].get<int64_t>(), {}, {}});
    node->ranks.push_back(static_cast<int>(rank));
    if (static_cast<int>(rank) == world.rank()) check.node = static_cast<size_t>(node - report.nodes.begin());
  }
  const auto environment = [](const char* name) { return std::string(std::getenv(name) ? std::getenv(name) : ""); };
  const std::string job = environment("SLURM_JOB_ID"), tasks = environment("SLURM_STEP_NUM_TASKS"), nodes = environment("SLURM_JOB_NUM_NODES");
  if (job.empty()) return;
  const bool by_mpirun = !environment("OMPI_COMM_WORLD_SIZE").empty();   // whose daemons are then the tasks of the step
  report.slurm = text("job ", job, by_mpirun || tasks.empty() ? "" : text(", ", tasks, " tasks in this step"));
  if (!nodes.empty() && nodes != std::to_string(report.nodes.size())) {
    report.notes.push_back(text("the Slurm job has ", nodes, " nodes, and ranks run on ", report.nodes.size(), " of them"));
  }
}

void tell_bindings(Check& check) {
  for (const NodeCheck& node : check.report.nodes) {
    std::vector<RankCpus> ranks;
    for (const int rank : node.ranks) ranks.push_back({rank, check.report.ranks[static_cast<size_t>(rank)].cpus});
    for (const std::string& line : odd_bindings(ranks)) check.report.notes.push_back(text("node ", node.host, ": ", line));
  }
}

}  // namespace upcycle
