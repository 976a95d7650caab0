#include "train/one_run.hpp"

#include "base/fault.hpp"
#include "base/log.hpp"
#include "checkpoint/durable.hpp"
#include "train/certify.hpp"
#include "train/start.hpp"

namespace upcycle {

Run::Run(const RunConfig& run_config, Mesh& run_mesh, Setup& run_setup, Watchdog& watchdog, const RunLock* lock, at::Device device)
    : config(run_config),
      mesh(run_mesh),
      setup(run_setup),
      checkpoints(setup.directory / "checkpoints"),
      stage(setup.target.architecture, make_layout(setup.target.architecture, mesh.grid(), config.parallel), mesh, model_settings(config)),
      saver(checkpoints, mesh, config.checkpoint, [this] { alive(step_, "writing a checkpoint"); }, available_host_memory, device),
      watchdog_(watchdog),
      lock_(lock) {
  stage.weights().allocate(compute_dtype(config.train.precision), device, config.parallel.zero);
}

void Run::begin() {
  std::optional<Recipe>& recipe = setup.target.recipe;
  std::string sources;
  for (const std::string& model : config.source.all()) sources += (sources.empty() ? "" : ", ") + model;
  log::info(recipe ? "growing experts out of " + sources : setup.source ? "reading " + sources : std::string("random initialisation"));
  if (recipe && recipe->of_mixture() && recipe->noise == 0 && recipe->drop == 0) {
    log::warning("copies of one expert that start equal and get the same tokens stay equal: upcycle.noise or upcycle.drop tells them apart");
  }
  const ReadDense read = reader_of(setup);
  if (recipe && recipe->permutation == UnitOrder::clusters) {
    find_clusters(*recipe, read, mesh.world(), [&] { alive(0, "clustering"); });
    setup.record.texts[kClustersFile] = clusters_to_text(*recipe);
  }
  mesh.world().together([&] {   // a source that is damaged may be so on one rank alone
    fill_masters(stage.weights(), recipe         ? grown(*recipe, read)
                                  : setup.source ? as_they_are(read)
                                                 : random(setup.target.architecture, static_cast<uint64_t>(config.run.seed)),
                 [&] { alive(0, "filling weights"); });
  });
  if (recipe && config.upcycle.certify) {
    const Certificate certificate = certify(stage, mesh, *recipe, read, *setup.train, config, [&] { alive(0, "certifying"); });
    log::info(certificate.table());
    setup.record.texts["certificate.json"] = certificate.to_json().dump(2) + "\n";
    setup.record.provenance["certificate"] = certificate.passed() ? "passed" : "failed";
    if (!certificate.passed()) {
      if (mesh.world().rank() == 0) write_text_durably(setup.directory / "certificate.json", setup.record.texts["certificate.json"]);
      throw CommonFault(mesh.world().rank() == 0, "the certificate failed: the grown model is not what its recipe promises (certificate.json)");
    }
  }
  if (config.upcycle.optimizer != Moments::reset) return;   // stored with its moments, once there is an optimizer
  TrainingState state;
  state.routers = setup.routers;
  save(nullptr, state);
}

void Run::carry_moments(Optimizer& optimizer, const TrainingState& state) {
  const WeightSource& source = *setup.source;
  const Recipe* const recipe = setup.target.recipe ? &*setup.target.recipe : nullptr;
  log::info(text("carrying the moments of ", source.folder().string(), " over, after ", source.updates(), " updates"));
  mesh.world().together([&] {
    fill_moments(stage.weights(), optimizer, [&](const ParameterSpec& spec, const Box& box, bool second, Tensor target) {
      const auto read = [&](const std::string& name, const Box& part) { return source.read_moment(second, name, part); };
      recipe ? grow_moment(spec, box, *recipe, config.upcycle.optimizer, second, read, target) : void(target.copy_(read(spec.name, box)));
    }, [&] { alive(0, "carrying moments"); });
  });
  optimizer.updates().fill_(source.updates());
  save(&optimizer, state);
}

void Run::alive(int64_t step, const char* doing) {
  step_ = step;
  watchdog_.beat(step, doing);
  if (lock_) lock_->touch();
}

}  // namespace upcycle
