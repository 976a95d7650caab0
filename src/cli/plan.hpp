#pragma once
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "config/run_config.hpp"
#include "parallel/grid.hpp"
#include "train/memory_plan.hpp"
#include "train/passes.hpp"
#include "train/snapshot.hpp"
#include "train/target.hpp"
#include "train/traffic_plan.hpp"

namespace upcycle {

/// What a run would be, without its weights.
struct Plan {
  RunConfig run;
  std::string source = {};              ///< where the architecture was read
  bool has_weights = false;             ///< source.model is named: the run starts from weights, there today or not
  Target target = {};
  ParameterCount parameters = {};
  double flops_per_token = 0;           ///< forward and backward, nothing recomputed
  CheckpointBytes checkpoint = {};
  int ranks = 1;
  std::optional<Grid> grid = {};        ///< empty when the degrees fit no grid of `ranks`
  std::vector<RankMemory> memory = {};  ///< the largest rank of each pipeline stage
  std::vector<RankMemory> by_recompute = {};  ///< the largest rank of all with train.recompute none, selective and full
  int64_t gpu_memory = 80'000'000'000;  ///< of each rank; assumed unless given
  bool gpu_memory_given = false;
  int64_t micro_batches = 0;            ///< of each data-parallel rank in a step
  double bubble = 0;                    ///< the pipeline's idle time over its computing time
  std::vector<Traffic> traffic = {};    ///< bytes sent in a step
  std::vector<Passes> passes = {};      ///< over the data sets of data.train; empty where a file of theirs is not there
  std::vector<std::string> problems = {};   ///< what does not divide, not fit the memory that was given, or takes too much of the data
};

/// `ranks`: default the smallest world that [parallel] allows. Throws UserError for what no number of ranks would mend.
Plan make_plan(const RunConfig&, std::optional<int> ranks, std::optional<int64_t> gpu_memory);

/// For people and for programs.
std::string to_text(const Plan&);
nlohmann::ordered_json to_json(const Plan&);

}  // namespace upcycle
