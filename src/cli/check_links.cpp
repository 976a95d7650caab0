#include <algorithm>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <set>

#include "cli/check_parts.hpp"
#include "cli/deadline.hpp"
#include "cli/roll_call.hpp"
#include "parallel/links.hpp"
#include "parallel/nccl.hpp"

namespace upcycle {
namespace {

/// Whether `group`'s tensors travel by NCCL from now on; if it refuses, `refusal` says why.
bool may_use_nccl(const Check& check, Communicator& group, std::string& refusal) {
  const RunSection& run = check.config->run;
  if (!check.device->is_cuda() || !nccl::built_in() || run.transport == Transport::mpi || run.share_gpu) return false;
  std::string what;
  try {
    group.use_nccl();
  } catch (const std::exception& error) {
    what = error.what();
  }
  if (what.empty()) return true;
  group.leave_nccl();
  refusal = what;
  return false;
}

/// All ranks at once.
void measure_all_reduce(Check& check, std::string& refusal) {
  const Communicator& world = check.world;
  Communicator everyone = world.split(0, world.rank());
  const Deadline deadline(kPatience, text("rank ", world.rank(), " (", check.here().host, ") waits for an all-reduce of all ranks for more than ", kPatience, " s"), kExitMistake);
  if (world.size() > 1 && may_use_nccl(check, everyone, refusal)) check.report.transport = "NCCL";
  if (world.size() > 1) check.report.all_reduce = links::all_reduce_speed(everyone, *check.device);
}

/// The pairs of nodes of which this rank speaks for the first.
std::vector<CheckReport::Pair> measure_pairs(Check& check, std::string& refusal) {
  const Communicator& world = check.world;
  const CheckReport& report = check.report;
  const Communicator heads = world.split(check.speaks() ? 0 : 1, world.rank());
  std::vector<CheckReport::Pair> mine;
  for (const auto& round : links::ring_rounds(static_cast<int>(report.nodes.size()))) {
    const auto pair = std::find_if(round.begin(), round.end(), [&](const auto& ends) {
      return static_cast<size_t>(ends.first) == check.node || static_cast<size_t>(ends.second) == check.node;
    });
    const bool takes_part = check.speaks() && pair != round.end();
    Communicator two = heads.split(takes_part ? static_cast<int>(pair - round.begin()) : static_cast<int>(round.size()), world.rank());
    if (takes_part) {
      const std::string a = report.nodes[static_cast<size_t>(pair->first)].host, b = report.nodes[static_cast<size_t>(pair->second)].host;
      const Deadline deadline(kPatience, text("nodes ", a, " and ", b, ": no answer of one to the other within ", kPatience, " s"), kExitMistake);
      if (report.transport == "NCCL") may_use_nccl(check, two, refusal);
      const double speed = links::exchange_speed(two, *check.device);
      if (static_cast<size_t>(pair->first) == check.node) mine.push_back({a, b, speed});
    }
    world.barrier();
    RollCall::met();
  }
  return mine;
}

void gather_pairs(Check& check, const std::vector<CheckReport::Pair>& mine) {
  CheckReport& report = check.report;
  nlohmann::json own = nlohmann::json::array();
  for (const auto& [a, b, speed] : mine) own.push_back({a, b, speed});
  for (const std::string& told : check.world.all_gather(own.dump())) {
    for (const nlohmann::json& one : nlohmann::json::parse(told)) report.pairs.push_back({one[0], one[1], one[2]});
  }
  const double floor = check.arguments.check.bandwidth_floor;
  for (NodeCheck& node : report.nodes) {
    for (const auto& [a, b, speed] : report.pairs) {
      if (a == node.host || b == node.host) node.link = std::max(node.link.value_or(0), speed);
    }
    if (node.link && *node.link < floor) {
      report.problems.push_back(text("node ", node.host, ": ", std::setprecision(3), *node.link, " GB/s to the better of its neighbours, by ", report.transport,
                                     std::setprecision(9), ", is under --bandwidth-floor ", floor, ": leave it out (sbatch --exclude=", node.host, ")"));
    }
  }
  if (floor > 0 && report.nodes.size() == 1) report.notes.push_back("one node alone has no neighbours: --bandwidth-floor was held against nothing");
}

}  // namespace

void measure_links(Check& check) {
  std::string refusal;   // of NCCL, here; the newest
  check.report.transport = "MPI";
  measure_all_reduce(check, refusal);
  gather_pairs(check, measure_pairs(check, refusal));
  std::set<std::string> refusals;
  for (const std::string& told : check.world.all_gather(refusal)) {
    if (!told.empty()) refusals.insert(told);
  }
  for (const std::string& line : refusals) {
    (check.config->run.transport == Transport::nccl ? check.report.problems : check.report.notes).push_back(
        "NCCL refuses, so tensors travel by MPI through host memory: " + line);
  }
}

}  // namespace upcycle
