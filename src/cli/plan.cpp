#include "cli/plan.hpp"

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "checkpoint/manifest.hpp"
#include "cli/command.hpp"
#include "model/flops.hpp"
#include "train/layout_check.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

/// The architecture of source.model: a Hugging Face directory, or a checkpoint of ours.
Architecture architecture_of_model(const fs::path& model, std::string& where) {
  if (fs::exists(model / "config.json") && !fs::exists(model / "manifest.json")) {
    where = (model / "config.json").string();
    return read_architecture(where);
  }
  const auto checkpoint = newest_checkpoint(model);
  if (!checkpoint)
    fail("source.model = ", model.string(),
         ": neither a Hugging Face directory (config.json) nor a checkpoint of upcycle");
  where = checkpoint->string();
  return architecture_from_hf(read_manifest(*checkpoint).architecture, where);
}

Architecture source_architecture(const RunConfig& run, std::string& where) {
  const bool model_is_there = !run.source.model.empty() && fs::exists(run.source.model);
  if (run.source.architecture.empty()) {
    if (!model_is_there)
      fail("source.model = ", run.source.model,
           " is not there; name a config.json in source.architecture to plan without it");
    return architecture_of_model(run.source.model, where);
  }
  const Architecture given = read_architecture(run.source.architecture);
  where = run.source.architecture;
  if (!model_is_there) return given;
  const std::vector<std::string> lines = differences(given, architecture_of_model(run.source.model, where));
  if (lines.empty()) return given;
  std::string all;
  for (const std::string& line : lines) all += "\n  " + line;
  fail("source.architecture = ", run.source.architecture, " is not the model in source.model = ", run.source.model, ":",
       all);
}

}  // namespace

Plan make_plan(const RunConfig& run, std::optional<int> ranks) {
  Plan plan{.run = run, .has_weights = !run.source.model.empty(), .not_built = not_built(run)};
  const Architecture source = source_architecture(run, plan.source);
  plan.target = choose_target(run, source, plan.has_weights);
  const Architecture& architecture = plan.target.architecture;
  plan.parameters = count_parameters(architecture);
  plan.flops_per_token = flops_per_token(architecture, run.train.sequence);
  plan.checkpoint = checkpoint_bytes(architecture, run.train.precision == Precision::bf16 ? at::kBFloat16 : at::kFloat);

  const int64_t world = ranks ? *ranks : smallest_world(run.parallel);
  constexpr int64_t kMostRanks = 1 << 20;
  if (world > kMostRanks) fail("[parallel] asks for ", world, " ranks; at most ", kMostRanks, " can be planned for");
  plan.ranks = static_cast<int>(world);
  LayoutCheck check = check_layout(run, architecture, plan.ranks);
  plan.problems = check.problems;
  plan.grid = check.grid;
  // Boxes exist where the mesh cuts the parameters evenly.
  if (plan.grid && plan.problems.empty())
    plan.memory = plan_memory(architecture, run, make_layout(architecture, *plan.grid, run.parallel));
  return plan;
}

int run_plan(const Arguments& arguments) {
  const Plan plan = make_plan(read_run(arguments.positional.at(0), arguments.set), arguments.ranks);
  if (arguments.json) {
    std::cout << to_json(plan).dump(2) << "\n";
  } else {
    std::cout << to_text(plan);
  }
  if (plan.problems.empty()) return kExitDone;
  std::string all;
  for (const std::string& problem : plan.problems) all += "\n  " + problem;
  fail(arguments.positional.at(0), " does not fit ", plan.ranks, " ranks:", all);
}

}  // namespace upcycle
