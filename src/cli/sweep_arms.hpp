#pragma once
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/plan.hpp"
#include "config/sweep_file.hpp"

namespace upcycle {

/// One run of a sweep.
struct SweepArm {
  std::string name;                    ///< of its directory: "experts-8_top_k-2_seed-1", "dense_seed-1"
  bool control = false;
  Settings settings;                   ///< on top of the base run file
  std::optional<RunConfig> run = {};   ///< resolved; empty: the settings make no run
  std::optional<Plan> plan = {};
  std::string cannot = {};             ///< why it can't run; empty: it can

  int64_t steps() const { return run ? run->train.steps : 0; }
  double tokens_per_step() const { return static_cast<double>(run->train.global_batch * run->train.sequence); }
};

/// All arms in the file's order, each seed by seed, the controls first; those that can't run with the reason. Throws UserError when the
/// base run file itself is wrong. With match = "flops" each arm has as many steps as give it the training FLOPs of the reference, the
/// control of its seed or, without one, the first arm; warm-up and descent shrink or grow with them.
std::vector<SweepArm> make_arms(const SweepFile&);

/// Gives `arm` so many steps; warm-up and descent in proportion.
void set_steps(SweepArm& arm, const SweepFile&, int64_t steps);

/// What an arm's run directory tells of it.
struct ArmProgress {
  int64_t saved = -1;                  ///< step of the newest checkpoint; -1: none
  std::optional<double> validation = {};   ///< the newest
  std::optional<double> tokens_per_second = {};   ///< median of the steps
};
ArmProgress progress_of(const std::filesystem::path& run_directory);

/// For people: one line an arm. `teraflops`: of an arm's ranks together, for the hours; 0: not known.
std::string sweep_table(const std::vector<SweepArm>&, double teraflops);
/// For the report and for programs.
nlohmann::ordered_json sweep_json(const SweepFile&, const std::vector<SweepArm>&);

}  // namespace upcycle
