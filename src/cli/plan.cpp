#include "cli/plan.hpp"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/quantities.hpp"
#include "checkpoint/manifest.hpp"
#include "cli/command.hpp"
#include "data/sampler.hpp"
#include "model/flops.hpp"
#include "train/hf_export.hpp"
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

void refuse_differences(const std::vector<std::string>& lines, const std::string& what) {
  if (lines.empty()) return;
  fail(what, ":", listed(lines));
}

/// Of source.model, or of all source.models that are there: they must be of one architecture.
std::optional<Architecture> architecture_of_models(const RunConfig& run, std::string& where) {
  std::optional<Architecture> first;
  for (const std::string& model : run.source.all()) {
    if (!fs::exists(model)) continue;
    std::string place;
    const Architecture next = architecture_of_model(model, place);
    if (first) {
      refuse_differences(differences(*first, next), text("source.models: ", where, " (here) and ", place, " (there) are no models of one shape"));
    } else {
      first = next, where = place;
    }
  }
  return first;
}

Architecture source_architecture(const RunConfig& run, std::string& where) {
  const std::optional<Architecture> found = architecture_of_models(run, where);
  if (run.source.architecture.empty()) {
    if (found) return *found;
    fail(run.source.models.empty() ? text("source.model = ", run.source.model, " is") : std::string("source.models are"),
         " not there; name a config.json in source.architecture to plan without it");
  }
  const Architecture given = read_architecture(run.source.architecture);
  if (found) {
    refuse_differences(differences(given, *found), text("source.architecture = ", run.source.architecture, " is not the model in ",
                                                        run.source.models.empty() ? text("source.model = ", run.source.model) : "source.models"));
  }
  if (!found) where = run.source.architecture;
  return given;
}

/// Moments that are to be carried over must be there, where the source is.
void refuse_lacking_moments(const RunConfig& run) {
  if (run.upcycle.optimizer == Moments::reset || !fs::exists(run.source.model)) return;
  const auto checkpoint = newest_checkpoint(run.source.model);
  if (checkpoint && read_manifest(*checkpoint).files.contains(kFirstMomentsFile)) return;
  fail("upcycle.optimizer: source.model = ", run.source.model, " has no moments to carry over: name a checkpoint that training wrote, not step 0 ",
       "and not a Hugging Face directory, or leave the key out (\"reset\")");
}

void plan_on_grid(Plan& plan) {
  const Architecture& architecture = plan.target.architecture;
  const Layout layout = make_layout(architecture, *plan.grid, plan.run.parallel);
  plan.memory = plan_memory(architecture, plan.run, layout);
  plan.micro_batches = micro_batches_of_rank(plan.run, *plan.grid);
  plan.bubble = pipeline_bubble(plan.run, *plan.grid);
  plan.traffic = plan_traffic(architecture, plan.run, layout);
  for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
    RunConfig other = plan.run;
    other.train.recompute = recompute;
    plan.by_recompute.push_back(largest(plan_memory(architecture, other, layout)));
  }
  const RankMemory& most = largest(plan.memory);
  if (!plan.gpu_memory_given || most.total() <= plan.gpu_memory) return;
  const RankMemory& least = plan.by_recompute.back();
  plan.problems.push_back(text("stage ", most.stage, " needs ", gigabytes(most.total()), " on each rank, and a GPU has ", gigabytes(plan.gpu_memory),
                               least.total() <= plan.gpu_memory
                                   ? text(": train.recompute = \"full\" would need ", gigabytes(least.total()))
                                   : std::string(": spread it over more ranks (parallel.pipeline, expert, tensor), or cut train.micro_batch")));
}

/// The data's indices are read where all files are there; a run is often planned elsewhere.
void plan_data(Plan& plan) {
  const DataSection& data = plan.run.data;
  const auto there = [](const Blend& part) { return part.prefix == "mock" || (fs::exists(part.prefix + ".idx") && fs::exists(part.prefix + ".bin")); };
  if (data.train.empty() || !std::all_of(data.train.begin(), data.train.end(), there)) return;
  const Sampler sampler(data.train, data.split, Split::train, plan.run.train.sequence, plan.target.architecture.vocab,
                        static_cast<uint64_t>(plan.run.data_seed()), data.documents);
  plan.passes = passes_of(plan.run, sampler);
  if (const std::string problem = too_many_passes(plan.run, sampler); !problem.empty()) plan.problems.push_back(problem);
}

}  // namespace

Plan make_plan(const RunConfig& run, std::optional<int> ranks, std::optional<int64_t> gpu_memory) {
  Plan plan{.run = run, .has_weights = !run.source.all().empty()};
  const Architecture source = source_architecture(run, plan.source);
  refuse_lacking_moments(run);
  plan.target = choose_target(run, source, plan.has_weights);
  if (run.source.models.size() > 1 && !plan.target.recipe) {
    fail("source.models names ", run.source.models.size(), " models, which become experts of one: say how many in moe.experts, or name one model");
  }
  const Architecture& architecture = plan.target.architecture;
  plan.parameters = count_parameters(architecture);
  plan.flops_per_token = flops_per_token(architecture, run.train.sequence);
  plan.checkpoint = checkpoint_bytes(architecture, run.train.precision == Precision::bf16 ? at::kBFloat16 : at::kFloat);
  if (run.upcycle.optimizer != Moments::reset) plan.checkpoint.step_zero = plan.checkpoint.full;   // moments are carried over

  const int64_t world = ranks ? *ranks : smallest_world(run.parallel);
  constexpr int64_t kMostRanks = 1 << 20;
  if (world > kMostRanks) fail("[parallel] asks for ", world, " ranks; at most ", kMostRanks, " can be planned for");
  plan.ranks = static_cast<int>(world);
  LayoutCheck check = check_layout(run, architecture, plan.ranks);
  plan.problems = check.problems;
  plan.grid = check.grid;
  if (gpu_memory) plan.gpu_memory = *gpu_memory, plan.gpu_memory_given = true;
  // Boxes exist where the mesh cuts the parameters evenly.
  if (plan.grid && plan.problems.empty()) plan_on_grid(plan);
  plan_data(plan);
  return plan;
}

int run_plan(const Arguments& arguments) {
  std::optional<int64_t> gpu_memory;
  if (arguments.gpu_memory) {
    gpu_memory = while_doing("--gpu-memory", [&] { return static_cast<int64_t>(bytes_from_text(*arguments.gpu_memory)); });
  }
  const Plan plan = make_plan(read_run(arguments.positional.at(0), arguments.set), arguments.ranks, gpu_memory);
  if (arguments.json) {
    std::cout << to_json(plan).dump(2) << "\n";
  } else {
    std::cout << to_text(plan);
  }
  if (plan.problems.empty()) return kExitDone;
  fail(arguments.positional.at(0), " can't be trained on ", plan.ranks, " ranks:", listed(plan.problems));
}

}  // namespace upcycle
