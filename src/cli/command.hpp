#pragma once
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "base/exit_code.hpp"
#include "base/log.hpp"
#include "base/progress_watch.hpp"

namespace upcycle {

/// `sample`'s own options.
struct SampleOptions {
  std::optional<std::string> prompt, prompt_file;
  int tokens = 128;
  double temperature = 0.0;
  double top_p = 1.0;
  uint64_t seed = 0;
  int samples = 1;
  bool routing = false;
  std::string device = "auto";
};

/// `check`'s own options.
struct CheckOptions {
  bool files_only = false;
  std::optional<std::string> print = {};   ///< a key of the run file
  double bandwidth_floor = 0;              ///< GB/s; 0: none
  double wait = 20;                        ///< seconds within which all ranks must have come
  std::optional<double> save_within = {};  ///< seconds before its end for which Slurm asks the job to save
};

/// A command line, understood.
struct Arguments {
  std::string command;                   ///< "plan", ...; "help" or "version" when only `output` is wanted
  std::vector<std::string> positional = {};   ///< as many as the command takes
  std::vector<std::string> set = {};     ///< --set key=value
  bool json = false;
  bool accept_changes = false;           ///< train --accept-changes
  std::string profile = {};              ///< train --profile
  bool tensors = false;                  ///< inspect --tensors
  std::optional<int> ranks = {};         ///< plan --ranks
  std::optional<std::string> gpu_memory = {};      ///< plan --gpu-memory
  std::optional<std::string> dtype = {};           ///< export --dtype
  std::optional<std::string> max_shard_size = {};  ///< export --max-shard-size
  bool dry_run = false;                  ///< sweep --dry-run
  bool slurm = false;                    ///< sweep --slurm
  bool run_file = false;                 ///< sweep --run-file
  std::optional<int64_t> arm = {};       ///< sweep --arm
  bool dense = false;                    ///< export --dense
  SampleOptions sample = {};
  CheckOptions check = {};
  ProgressLimits watch = {};             ///< watch --start, --step, --checkpoint
  std::optional<std::string> tokenizer = {};       ///< sample, inspect: the directory of one
  std::optional<std::string> data = {};            ///< evaluate --data
  std::optional<int> batches = {};                 ///< evaluate --batches
  log::Level level = log::Level::info;
  std::string output = {};               ///< what --help and --version print
};

/// Throws UserError for an unknown command or option (with a suggestion), a missing or surplus argument, a bad value.
Arguments parse_arguments(int argc, const char* const* argv);

/// The rank that the launcher gave this process, before MPI is up. 0 without a launcher.
int launched_rank();

/// True for commands that run on several ranks. The others answer at once, without MPI.
bool needs_mpi(const Arguments&);

/// Runs the command and returns its exit code.
int run_command(const Arguments&);

int run_plan(const Arguments&);
int run_convert(const Arguments&);
int run_train(const Arguments&);
int run_export(const Arguments&);
int run_inspect(const Arguments&);
int run_verify(const Arguments&);
int run_sweep(const Arguments&);
int run_check(const Arguments&);
int run_check_here(const Arguments&);   ///< the parts that need no MPI: --files-only, --print
int run_watch(const Arguments&);
int run_sample(const Arguments&);
int run_evaluate(const Arguments&);

/// Says what went wrong, and returns the exit code. A user's mistake, and a fault that all ranks meet, is told once. A fault, and a
/// mistake that one rank meets alone, ends all ranks. For use in main's handlers, with MPI up or not.
int explain_mistake(const std::exception& error);
int explain_fault(const std::exception& error);

}  // namespace upcycle
