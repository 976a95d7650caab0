#include "train/evaluate.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/fault.hpp"
#include "base/log.hpp"
#include "checkpoint/manifest.hpp"
#include "train/agreement.hpp"
#include "train/layout_check.hpp"
#include "train/run_changes.hpp"
#include "train/setup.hpp"
#include "train/start.hpp"
#include "train/trainer.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

// Weights that came about in another way say nothing about this run. Data, lengths and layout may be others: that is what is asked.
void refuse_other_origin(const RunConfig& config) {
  const fs::path file = fs::path(config.run.directory) / "run.toml";
  if (!fs::exists(file)) return;
  for (const RunChange& change : run_changes(read_run(file.string()), config)) {
    if (change.section() == "source" || (change.section() == "moe" && config.moe_given) || change.section() == "upcycle") {
      fail("run.directory = ", config.run.directory, " belongs to another run: ", line_of(change), " (", file.string(), " made it)");
    }
  }
}

// Where this checkpoint's weights came from: source.model may be a run that has gone on since.
fs::path origin_of(const fs::path& checkpoint, const std::string& otherwise) {
  const nlohmann::json source = read_manifest(checkpoint).provenance.value("source", nlohmann::json());
  const fs::path path = source.is_object() ? source.value("path", "") : "";
  return fs::is_directory(path) ? path : fs::path(otherwise);
}

// A dense model knows nothing of the axes of experts.
RunConfig layout_for(const RunConfig& config, const Architecture& architecture) {
  RunConfig out = config;
  if (!architecture.is_moe()) out.parallel.expert = out.parallel.expert_tensor = 1;
  return out;
}

double validation_loss(const RunConfig& config, const WeightSource& source, int world, at::Device device, int64_t batches) {
  const Architecture& architecture = source.architecture();
  Mesh mesh(Grid(config.parallel, world));
  mesh.prepare(device, config.run.transport);
  Stage stage(architecture, make_layout(architecture, mesh.grid(), config.parallel), mesh, model_settings(config));
  stage.weights().allocate_for_inference(compute_dtype(config.train.precision), device);
  fill_masters(stage.weights(), as_they_are([&](const std::string& name, const Box& box) { return source.read(name, box); }));
  if (source.is_checkpoint()) {
    Balance(config, mesh, stage).restore(read_manifest(source.folder()).training.value("routers", nlohmann::json()));
  }
  return ForwardPass(config, mesh, stage).validate(open_validation(config, architecture.vocab), batches);
}

}  // namespace

std::vector<Evaluated> models_of(const RunConfig& config) {
  refuse_other_origin(config);
  std::vector<Evaluated> models;
  const fs::path directory = config.run.directory;
  const auto newest = newest_checkpoint(directory);
  if (!config.source.model.empty()) {
    const WeightSource source(newest ? origin_of(*newest, config.source.model) : fs::path(config.source.model));
    models.push_back({source.architecture().is_moe() ? "source" : "dense", source.folder()});
  }
  if (newest) {
    const int64_t step = read_manifest(*newest).step;
    const auto first = newest_checkpoint(newest->parent_path() / step_directory(0));
    if (first && step != 0) models.push_back({"step 0", *first});
    models.push_back({text("step ", step), *newest});
  }
  if (models.empty()) {
    fail("nothing to evaluate: the run starts at random, and run.directory = ", directory.string(), " has no checkpoint yet");
  }
  return models;
}

Evaluation evaluate(const RunConfig& config, const Communicator& world, at::Device device, int64_t batches) {
  std::string list;
  world.together([&] {
    if (world.rank() != 0) return;
    nlohmann::json found = nlohmann::json::array();
    for (const Evaluated& model : models_of(config)) found.push_back({model.model, model.folder.string()});
    list = found.dump();
  });
  Evaluation out;
  for (const auto& model : nlohmann::json::parse(world.broadcast(list, 0))) out.models.push_back({model[0], model[1].get<std::string>()});

  std::vector<WeightSource> sources;
  Facts facts;
  world.together([&] {
    for (const Evaluated& model : out.models) {
      const WeightSource& source = sources.emplace_back(model.folder);
      source.check();
      refuse_what_does_not_divide(layout_for(config, source.architecture()), source.architecture(), world.size());
      const Sampler data = open_validation(config, source.architecture().vocab);
      if (world.rank() == 0) data.check(source.architecture().vocab);
      out.tokens = data.learned(0, batches * config.train.global_batch);
      for (const auto& fact : facts_of_directory(model.model, source.folder())) facts.push_back(fact);
    }
  });
  if (world.size() > 1) agree(world, "the models", facts);
  for (size_t i = 0; i < sources.size(); ++i) {
    log::info(text("evaluating ", out.models[i].model, ", ", out.models[i].folder.string()));
    const RunConfig own = layout_for(config, sources[i].architecture());
    try {
      out.models[i].loss = validation_loss(own, sources[i], world.size(), device, batches);
    } catch (const std::exception& error) {
      if (fs::exists(out.models[i].folder)) throw;
      throw LonelyMistake(text(out.models[i].folder.string(), " was removed while it was read (checkpoint.keep): evaluate again"));
    }
  }
  return out;
}

}  // namespace upcycle
