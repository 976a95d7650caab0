#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/process.hpp"
#include "config/run_config.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// What must be the same on all ranks, as one rank sees it: (what, value).
using Facts = std::vector<std::pair<std::string, std::string>>;

/// **Collective.** Throws UserError, on all ranks, when a rank's facts differ from rank 0's: names the lowest such rank and its host,
/// what differs, and both values. `topic`: "the run", say.
void agree(const Communicator& world, const std::string& topic, const Facts& mine);

/// **Collective** over MPI_COMM_WORLD. What comes before anything else on several ranks: the launcher has started as many ranks as MPI
/// sees, and all ranks run the same command of the same executable. Throws UserError.
void agree_on_program(const Communicator& world, const std::string& command);

/// **Collective.** Every rank reads the run file by itself, for a rank on another host may see another one; all see the same settings
/// and the same files behind [source] and [data] (names, sizes, and digests of samples of their bytes). Throws UserError.
RunConfig read_agreed_run(const Communicator& world, const std::string& path, const std::vector<std::string>& overrides);

/// **Collective.** The process of every rank.
std::vector<Process> gather_processes(const Communicator& world);

/// Names and contents of a model directory's, a checkpoint's, or a data prefix's files. Pure but for the files it reads.
Facts facts_of_directory(const std::string& key, const std::filesystem::path& directory);

/// How many ranks the launcher has started, by the environment that it gives them: its nearest one, which says the most.
struct LaunchedRanks {
  int ranks;
  const char* variable;   ///< that says so
};
std::optional<LaunchedRanks> launched_ranks();

/// "N ranks were started, but MPI sees `world`" as a UserError, from that environment.
void check_world_size(int world);

/// Throws UserError when `command` is one that takes a whole Slurm job (train, check), mpirun has started it from the job's script or shell, and
/// on other than the job's tasks. What runs without a launcher, and any other command, may take a part of a job; so may a job in which
/// tasks were not asked for, or one.
void check_whole_job(const std::string& command, int world);

}  // namespace upcycle
