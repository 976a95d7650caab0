#pragma once
#include <c10/core/Device.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/check.hpp"
#include "cli/command.hpp"
#include "parallel/communicator.hpp"
#include "train/setup.hpp"

namespace upcycle {

/// Seconds for what a broken node may never come back from.
inline constexpr double kPatience = 60;

/// A start that is looked at: what its parts have found out so far. The report is the same on all ranks.
struct Check {
  const Communicator& world;
  const Arguments& arguments;
  CheckReport report = {};
  size_t node = 0;                           ///< this rank's, of report.nodes
  std::optional<RunConfig> config = {};
  std::optional<Setup> setup = {};
  std::optional<c10::Device> device = {};    ///< when all ranks have one of their own

  const NodeCheck& here() const { return report.nodes[node]; }
  bool speaks() const { return here().ranks.front() == world.rank(); }

  /// **Collective.** What `action` complains of, once where all ranks say the same, else by node. `action` calls nothing collective, and
  /// where it does not come back (a file system that hangs) this rank says so and ends all.
  bool by_node(const std::string& what, const std::function<void()>& action);
};

// The parts, in this order; all **collective**.

/// Which ranks are where, and what Slurm says of it.
void find_nodes(Check&);
/// Fills `config`, if all ranks can read the run file.
void read_run_file(Check&);
/// Fills `setup`, if all ranks can read what the run file names. From here on there is a config.
void open_inputs(Check&);
/// Fills `device`.
void find_devices(Check&);
/// The run's part of each rank against its GPU's memory, or its node's.
void plan_memory(Check&);
/// What the run's checkpoints need against what is free.
void compare_room(Check&);
void measure_disks(Check&);
/// A save against the time that Slurm gives.
void compare_time(Check&);
/// Needs a device.
void measure_links(Check&);
void tell_bindings(Check&);

/// As train does before anything is written, and what it would meet later: all but its lock, and every token id, which can be terabytes.
/// Each rank by itself. Throws UserError.
Setup check_inputs(const RunConfig& config, int ranks);

/// Throws UserError when a job with `tasks` tasks on `nodes` nodes of `gpus` GPUs each would have ranks share GPUs, and the run does not ask
/// for that. Pure.
void refuse_more_tasks_than_gpus(const RunConfig& config, int64_t tasks, int64_t nodes, int64_t gpus);

/// Of a Slurm job, as far as it is known.
struct TimeLimit {
  std::optional<double> left = {};   ///< seconds until Slurm ends it
  std::optional<double> lead = {};   ///< seconds before that for which it asks to save
};
/// Holds a checkpoint of `bytes`, at the speed of all nodes' disks, against the limit: fills the report's time, and says in its problems and
/// notes what should be changed. Pure but for the report.
void weigh_time(CheckReport& report, uint64_t bytes, const TimeLimit& limit);

}  // namespace upcycle
