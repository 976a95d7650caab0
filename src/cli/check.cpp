#include "cli/check.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "base/cpu_binding.hpp"
#include "base/gigabytes.hpp"
#include "base/host_memory.hpp"
#include "base/process.hpp"
#include "checkpoint/durable.hpp"
#include "cli/command.hpp"
#include "cli/deadline.hpp"
#include "config/suggest.hpp"
#include "device/device.hpp"
#include "parallel/gpu_sharing.hpp"
#include "parallel/links.hpp"
#include "parallel/nccl.hpp"
#include "train/agreement.hpp"
#include "train/layout_check.hpp"
#include "train/memory_plan.hpp"
#include "train/one_run.hpp"
#include "train/room_plan.hpp"
#include "train/run_directory.hpp"
#include "train/run_requests.hpp"
#include "train/setup.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

constexpr double kPatience = 60;   // seconds for what a broken node may never come back from

/// What can't be written there, train would meet after it has read the source.
void refuse_unwritable(const fs::path& directory) {
  const fs::path place = existing_part(directory);
  if (::access(place.c_str(), W_OK | X_OK) != 0) fail_with_errno("writing into", place);
}

/// As train does before anything is written, and what it would meet later: all but its lock, and every token id, which can be terabytes.
/// Throws UserError.
Setup check_inputs(const RunConfig& config, int ranks) {
  refuse_stop_file(config.run.directory);
  Setup setup = prepare_run(config, ranks, false);
  refuse_unwritable(config.run.directory);
  return setup;
}

/// The checks of one start, each filling its part of the report.
class Check {
 public:
  Check(const Communicator& world, const Arguments& arguments) : world_(world), arguments_(arguments) {}

  CheckReport run() {
    find_nodes();
    read_run_file();
    if (config_) {
      open_inputs();
      find_devices();
      plan_memory_and_room();
      measure_disks();
      if (device_) measure_links();
    }
    tell_bindings();
    report_.seconds = since_.seconds();
    return std::move(report_);
  }

 private:
  const NodeCheck& here() const { return report_.nodes[node_]; }
  bool speaks() const { return here().ranks.front() == world_.rank(); }

  /// **Collective.** What `action` complains of, once where all ranks say the same, else by node. `action` calls nothing collective, and
  /// where it does not come back (a file system that hangs) this rank says so and ends all.
  template <class Action>
  bool by_node(const std::string& what, const Action& action) {
    std::string mistake;
    try {
      const Deadline deadline(kPatience, text("node ", here().host, ", rank ", world_.rank(), ": ", what, " takes more than ", kPatience, " s"), kExitMistake);
      action();
    } catch (const UserError& error) {
      mistake = error.what();
    }
    std::map<std::string, std::vector<int>> who;
    const std::vector<std::string> told = world_.all_gather(mistake);
    for (size_t rank = 0; rank < told.size(); ++rank) {
      if (!told[rank].empty()) who[told[rank]].push_back(static_cast<int>(rank));
    }
    for (const auto& [complaint, ranks] : who) {
      if (static_cast<int>(ranks.size()) == world_.size()) {
        report_.problems.push_back(text(report_.nodes.size() > 1 ? "all nodes: " : "", complaint));
        continue;
      }
      for (const NodeCheck& node : report_.nodes) {
        std::vector<int> those;
        std::set_intersection(node.ranks.begin(), node.ranks.end(), ranks.begin(), ranks.end(), std::back_inserter(those));
        if (!those.empty()) report_.problems.push_back(text("node ", node.host, those == node.ranks ? "" : text(", rank ", ranges(those)), ": ", complaint));
      }
    }
    return who.empty();
  }

  void find_nodes() {
    nlohmann::json mine = {{"host", host_name()}, {"cpus", bound_cpus()}, {"memory", available_host_memory()}};
    const std::vector<std::string> told = world_.all_gather(mine.dump());
    for (size_t rank = 0; rank < told.size(); ++rank) {
      const nlohmann::json one = nlohmann::json::parse(told[rank]);
      const std::string host = one["host"];
      report_.ranks.push_back({host, one["cpus"].get<std::vector<int>>(), {}, {}});
      auto node = std::find_if(report_.nodes.begin(), report_.nodes.end(), [&](const NodeCheck& known) { return known.host == host; });
      if (node == report_.nodes.end()) node = report_.nodes.insert(node, NodeCheck{host, {}, one["memory"].get<int64_t>(), {}, {}});
      node->ranks.push_back(static_cast<int>(rank));
      if (static_cast<int>(rank) == world_.rank()) node_ = static_cast<size_t>(node - report_.nodes.begin());
    }
    const auto environment = [](const char* name) { return std::string(std::getenv(name) ? std::getenv(name) : ""); };
    const std::string job = environment("SLURM_JOB_ID"), tasks = environment("SLURM_STEP_NUM_TASKS"), nodes = environment("SLURM_JOB_NUM_NODES");
    if (job.empty()) return;
    const bool by_mpirun = !environment("OMPI_COMM_WORLD_SIZE").empty();   // whose daemons are then the tasks of the step
    report_.slurm = text("job ", job, by_mpirun || tasks.empty() ? "" : text(", ", tasks, " tasks in this step"));
    if (!nodes.empty() && nodes != std::to_string(report_.nodes.size())) {
      report_.notes.push_back(text("the Slurm job has ", nodes, " nodes, and ranks run on ", report_.nodes.size(), " of them"));
    }
  }

  void read_run_file() {
    RunConfig read;
    if (!by_node("reading the run file", [&] { read = read_run(arguments_.positional.at(0), arguments_.set); })) return;
    config_.emplace(std::move(read));
    try {
      read_agreed_run(world_, arguments_.positional.at(0), arguments_.set);
    } catch (const UserError& error) {   // the same on all ranks
      report_.problems.push_back(error.what());
    }
  }

  void open_inputs() {
    if (by_node("reading what the run file names", [&] { setup_.emplace(check_inputs(*config_, world_.size())); })) {
      report_.layout = describe(Grid(config_->parallel, world_.size()));
    } else {
      setup_.reset();
    }
    check_that_all_see_one_directory();
  }

  void check_that_all_see_one_directory() {
    if (report_.nodes.size() < 2) return;
    const fs::path probe = existing_part(config_->run.directory) / world_.broadcast(text(".upcycle-check-", host_name(), "-", ::getpid()), 0);
    if (world_.rank() == 0) std::ofstream(probe) << '\n';
    world_.barrier();
    by_node("looking into the run directory", [&] {
      const auto latest = std::chrono::steady_clock::now() + std::chrono::seconds(5);
      while (speaks() && !fs::exists(probe)) {
        if (std::chrono::steady_clock::now() > latest) {
          fail("run.directory = ", config_->run.directory, " is not the same directory here and on ", report_.nodes.front().host, ": choose one of a file ",
               "system that all nodes share");
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      }
    });
    std::error_code none;
    if (world_.rank() == 0) fs::remove(probe, none);
  }

  void find_devices() {
    std::optional<at::Device> device;
    const bool all = by_node("waking the GPU", [&] {
      device = device::choose(config_->run.device, host_rank());
      check_transport(*device, config_->run.transport);
    });
    nlohmann::json mine = {"", ""};
    if (device) mine = {device::name(*device), device->is_cuda() ? device::uuid(*device) : std::string()};
    const std::vector<std::string> told = world_.all_gather(mine.dump());
    for (size_t rank = 0; rank < told.size(); ++rank) {
      const nlohmann::json one = nlohmann::json::parse(told[rank]);
      report_.ranks[rank].device = one[0], report_.ranks[rank].gpu = one[1];
    }
    if (!all) return;
    if (std::any_of(report_.ranks.begin(), report_.ranks.end(), [&](const RankCheck& rank) { return rank.gpu.empty() == device->is_cuda(); })) {
      report_.problems.push_back("some ranks have a GPU and some have none: set run.device, or ask for the same on every node");
      return;
    }
    device_ = device;
    try {
      if (!config_->run.share_gpu) refuse_shared_gpus(world_, *device_);
    } catch (const UserError& error) {
      report_.problems.push_back(error.what());
      device_.reset();
    }
  }

  void plan_memory_and_room() {
    if (!setup_ || !device_) return;
    const Architecture& architecture = setup_->target.architecture;
    const Layout layout = make_layout(architecture, Grid(config_->parallel, world_.size()), config_->parallel);
    const RankMemory mine = rank_memory(architecture, *config_, layout, world_.rank());
    if (device_->is_cuda()) {
      by_node("asking the GPU for its memory", [&] {
        const int64_t total = device::memory(*device_).total;
        if (mine.total() > total) fail("its part of the model needs ", gigabytes(mine.total()), ", and its GPU has ", gigabytes(total), ": see upcycle plan");
      });
    } else {
      const std::vector<int64_t> each = world_.all_gather(mine.tensors());
      for (const NodeCheck& node : report_.nodes) {
        int64_t together = 0;
        for (const int rank : node.ranks) together += each[static_cast<size_t>(rank)];
        if (together > node.memory) report_.notes.push_back(text("node ", node.host, ": its ranks' parts of the model need ", gigabytes(together), ", and ", gigabytes(node.memory), " are free"));
      }
    }
    const CheckpointBytes bytes = checkpoint_bytes(architecture, compute_dtype(config_->train.precision));
    const RoomPlan plan = plan_room(*config_, bytes, setup_->resume ? setup_->resume->manifest().step : 0);
    const fs::path checkpoints = setup_->directory / "checkpoints";
    uint64_t there = 0;
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(checkpoints, none)) there += room_taken(entry.path());
    const std::string what = text(plan.checkpoints, plan.checkpoints == 1 ? " checkpoint" : " checkpoints");
    report_.room = text("checkpoints: ", plan.checkpoints, " at once at most, ", gigabytes(plan.bytes), "; ", gigabytes(there), " are there; ",
                        gigabytes(fs::space(existing_part(checkpoints), none).available), " are free");
    by_node("asking for free space", [&] {
      if (speaks()) check_free_space(checkpoints, plan.bytes - std::min(there, plan.bytes), text("the rest of ", what, " (checkpoint.keep and keep_every, and one being written)"));
    });
  }

  void measure_disks() {
    std::string told;
    world_.barrier();
    by_node("writing 256 MB into the run directory", [&] {
      if (speaks()) told = text(disk_speed(config_->run.directory));
    });
    const std::vector<std::string> all = world_.all_gather(told);
    for (NodeCheck& node : report_.nodes) {
      if (const std::string& speed = all[static_cast<size_t>(node.ranks.front())]; !speed.empty()) node.disk = std::stod(speed);
    }
  }

  /// Whether `group`'s tensors travel by NCCL from now on; why not is a problem or a note.
  bool may_use_nccl(Communicator& group) {
    if (!device_->is_cuda() || !nccl::built_in() || config_->run.transport == Transport::mpi || config_->run.share_gpu) return false;
    std::string refusal;
    try {
      group.use_nccl();
    } catch (const std::exception& error) {
      refusal = error.what();
    }
    if (refusal.empty()) return true;
    group.leave_nccl();
    refusal_ = refusal;
    return false;
  }

  void measure_links() {
    report_.transport = "MPI";
    Communicator everyone = world_.split(0, world_.rank());
    {
      const Deadline deadline(kPatience, text("rank ", world_.rank(), " (", here().host, ") waits for an all-reduce of all ranks for more than ", kPatience, " s"), kExitMistake);
      if (world_.size() > 1 && may_use_nccl(everyone)) report_.transport = "NCCL";
      if (world_.size() > 1) report_.all_reduce = links::all_reduce_speed(everyone, *device_);
    }
    const Communicator heads = world_.split(speaks() ? 0 : 1, world_.rank());
    std::vector<CheckReport::Pair> mine;
    for (const auto& round : links::ring_rounds(static_cast<int>(report_.nodes.size()))) {
      const auto pair = std::find_if(round.begin(), round.end(), [&](const auto& ends) { return static_cast<size_t>(ends.first) == node_ || static_cast<size_t>(ends.second) == node_; });
      const bool takes_part = speaks() && pair != round.end();
      Communicator two = heads.split(takes_part ? static_cast<int>(pair - round.begin()) : static_cast<int>(round.size()), world_.rank());
      if (takes_part) {
        const std::string a = report_.nodes[static_cast<size_t>(pair->first)].host, b = report_.nodes[static_cast<size_t>(pair->second)].host;
        const Deadline deadline(kPatience, text("nodes ", a, " and ", b, ": no answer of one to the other within ", kPatience, " s"), kExitMistake);
        if (report_.transport == "NCCL") may_use_nccl(two);
        const double speed = links::exchange_speed(two, *device_);
        if (static_cast<size_t>(pair->first) == node_) mine.push_back({a, b, speed});
      }
      world_.barrier();
    }
    gather_pairs(mine);
    std::set<std::string> refusals;
    for (const std::string& told : world_.all_gather(refusal_)) {
      if (!told.empty()) refusals.insert(told);
    }
    for (const std::string& line : refusals) {
      (config_->run.transport == Transport::nccl ? report_.problems : report_.notes).push_back("NCCL refuses, so tensors travel by MPI through host memory: " + line);
    }
  }

  void gather_pairs(const std::vector<CheckReport::Pair>& mine) {
    nlohmann::json own = nlohmann::json::array();
    for (const auto& [a, b, speed] : mine) own.push_back({a, b, speed});
    for (const std::string& told : world_.all_gather(own.dump())) {
      for (const nlohmann::json& one : nlohmann::json::parse(told)) report_.pairs.push_back({one[0], one[1], one[2]});
    }
    const double floor = arguments_.check.bandwidth_floor;
    for (NodeCheck& node : report_.nodes) {
      for (const auto& [a, b, speed] : report_.pairs) {
        if (a == node.host || b == node.host) node.link = std::max(node.link.value_or(0), speed);
      }
      if (node.link && *node.link < floor) {
        report_.problems.push_back(text("node ", node.host, ": ", std::setprecision(3), *node.link, " GB/s to the better of its neighbours, by ", report_.transport,
                                        std::setprecision(9), ", is under --bandwidth-floor ", floor, ": leave it out (sbatch --exclude=", node.host, ")"));
      }
    }
    if (floor > 0 && report_.nodes.size() == 1) report_.notes.push_back("one node alone has no neighbours: --bandwidth-floor was held against nothing");
  }

  void tell_bindings() {
    for (const NodeCheck& node : report_.nodes) {
      std::vector<RankCpus> ranks;
      for (const int rank : node.ranks) ranks.push_back({rank, report_.ranks[static_cast<size_t>(rank)].cpus});
      for (const std::string& line : odd_bindings(ranks)) report_.notes.push_back(text("node ", node.host, ": ", line));
    }
  }

  const Communicator& world_;
  const Arguments& arguments_;
  const Stopwatch since_;
  CheckReport report_;
  size_t node_ = 0;                      ///< this rank's
  std::optional<RunConfig> config_;
  std::optional<Setup> setup_;
  std::optional<at::Device> device_;     ///< when all ranks have one of their own
  std::string refusal_;                  ///< of NCCL, here; the newest
};

[[noreturn]] void refuse(const std::string& run_file, const std::vector<std::string>& problems) {
  std::string lines;
  for (const std::string& problem : problems) lines += "\n  " + problem;
  fail(run_file, " can't be started here:", lines);
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

}  // namespace

int run_check(const Arguments& arguments) {
  const Communicator world = Communicator::everyone();
  const CheckReport report = Check(world, arguments).run();
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
  const char* tasks = std::getenv("SLURM_NTASKS");
  const int64_t ranks = tasks && std::atoi(tasks) > 0 ? std::atoi(tasks) : smallest_world(config.parallel);
  check_inputs(config, static_cast<int>(ranks));
  return kExitDone;
}

}  // namespace upcycle
