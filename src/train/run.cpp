#include "train/run.hpp"

#include <chrono>

#include "base/fault.hpp"
#include "base/log.hpp"
#include "base/shutdown.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/run_lock.hpp"
#include "device/device.hpp"
#include "model/flops.hpp"
#include "parallel/gpu_sharing.hpp"
#include "train/agreement.hpp"
#include "train/certify.hpp"
#include "train/expert_watch.hpp"
#include "train/memory_plan.hpp"
#include "train/metrics.hpp"
#include "train/run_directory.hpp"
#include "train/setup.hpp"
#include "train/start.hpp"
#include "train/step_zero.hpp"

namespace upcycle {
namespace {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// One run, from its first to its last step. Members in the order in which they come about.
class Run {
 public:
  Run(const RunConfig& config, Mesh& mesh, Setup& setup, Watchdog& watchdog, const RunLock* lock, at::Device device)
      : config_(config),
        mesh_(mesh),
        setup_(setup),
        watchdog_(watchdog),
        lock_(lock),
        checkpoints_(setup.directory / "checkpoints"),
        stage_(setup.target.architecture, make_layout(setup.target.architecture, mesh.grid(), config.parallel), mesh,
               model_settings(config)) {
    stage_.weights().allocate(compute_dtype(config.train.precision), device, config.parallel.zero);
  }

  // Step 0: the weights come from the source, are certified, and are stored before anything is trained.
  void begin() {
    std::string sources;
    for (const std::string& model : config_.source.all()) sources += (sources.empty() ? "" : ", ") + model;
    log::info(setup_.target.recipe ? "growing experts out of " + sources : setup_.source ? "reading " + sources : std::string("random initialisation"));
    if (setup_.target.recipe && setup_.target.recipe->of_mixture() && setup_.target.recipe->noise == 0 && setup_.target.recipe->drop == 0) {
      log::warning("copies of one expert that start equal and get the same tokens stay equal: upcycle.noise or upcycle.drop tells them apart");
    }
    const ReadDense read = reader_of(setup_);
    if (setup_.target.recipe && setup_.target.recipe->permutation == UnitOrder::clusters) {
      find_clusters(*setup_.target.recipe, read, mesh_.world(), [&] { alive(0, "clustering"); });
      setup_.record.texts[kClustersFile] = clusters_to_text(*setup_.target.recipe);
    }
    fill_masters(stage_.weights(), setup_.target.recipe   ? grown(*setup_.target.recipe, read)
                                   : setup_.source ? as_they_are(read)
                                                   : random(setup_.target.architecture, static_cast<uint64_t>(config_.run.seed)),
                 [&] { alive(0, "filling weights"); });
    if (setup_.target.recipe && config_.upcycle.certify) {
      const Certificate certificate = certify(stage_, mesh_, *setup_.target.recipe, read, *setup_.train, config_,
                                              [&] { alive(0, "certifying"); });
      log::info(certificate.table());
      setup_.record.texts["certificate.json"] = certificate.to_json().dump(2) + "\n";
      setup_.record.provenance["certificate"] = certificate.passed() ? "passed" : "failed";
      if (!certificate.passed()) {
        if (mesh_.world().rank() == 0) write_text_durably(setup_.directory / "certificate.json", setup_.record.texts["certificate.json"]);
        throw CommonFault(mesh_.world().rank() == 0,
                          "the certificate failed: the grown model is not what its recipe promises (certificate.json)");
      }
    }
    if (config_.upcycle.optimizer != Moments::reset) return;   // stored with its moments, once there is an optimizer
    TrainingState state;
    state.routers = setup_.routers;
    save(nullptr, state);
  }

  // The source's moments, as the recipe spreads them. They are part of step 0: a run that stops before its next checkpoint has them still.
  void carry_moments(Optimizer& optimizer, const TrainingState& state) {
    const WeightSource& source = *setup_.source;
    const Recipe* const recipe = setup_.target.recipe ? &*setup_.target.recipe : nullptr;
    log::info(text("carrying the moments of ", source.folder().string(), " over, after ", source.updates(), " updates"));
    fill_moments(stage_.weights(), optimizer, [&](const ParameterSpec& spec, const Box& box, bool second, Tensor target) {
      const auto read = [&](const std::string& name, const Box& part) { return source.read_moment(second, name, part); };
      recipe ? grow_moment(spec, box, *recipe, config_.upcycle.optimizer, second, read, target) : void(target.copy_(read(spec.name, box)));
    }, [&] { alive(0, "carrying moments"); });
    optimizer.updates().fill_(source.updates());
    save(&optimizer, state);
  }

  TrainingState restore(Optimizer& optimizer) {
    log::info("resuming from " + setup_.resume->folder().string());
    return restore_checkpoint(*setup_.resume, stage_.weights(), &optimizer);
  }

  int train() {
    Optimizer optimizer(stage_.weights(), config_.optimizer, config_.router_lr_scale());
    Trainer trainer(config_, mesh_, stage_, optimizer, *setup_.train);
    TrainingState& state = trainer.state();
    state.routers = setup_.routers;
    if (setup_.resume) {
      state = restore(optimizer);
    } else if (config_.upcycle.optimizer != Moments::reset) {
      carry_moments(optimizer, state);
    }
    trainer.balance().restore(state.routers);
    const at::Device device = stage_.weights().all().front().parameter.value.device();
    Metrics metrics(config_, setup_.directory, mesh_.world().rank(), mesh_.world().size(),
                    {flops_per_token(setup_.target.architecture, config_.train.sequence),
                     device.is_cuda() ? peak_flops(device::name(device)) * mesh_.world().size() : 0.0},
                    state);
    ExpertWatch experts(stage_.weights(), mesh_, setup_.record);
    const int64_t looks_every = setup_.target.architecture.is_moe() ? config_.log.experts_every : 0;
    const auto look = [&] {
      metrics.experts(state.step, state.position, experts.look([&] { alive(state.step, "looking at the experts"); }));
    };
    std::optional<PendingReport> pending;
    int64_t saved = setup_.resume || state.step == 0 ? state.step : -1, skipped_in_a_row = 0;
    bool stop = false;
    const auto store = [&] {
      state.routers = trainer.balance().state();
      save(&optimizer, state);
      saved = state.step;
    };
    // Reports are read one step late, so that the host never waits for the step that it has just launched. A step's seconds are
    // those of its launch and those of the wait for its numbers: validation and checkpoints in between do not count.
    double launch_seconds = 0.0, pending_seconds = 0.0;
    const auto settle = [&](std::optional<PendingReport> next) {
      if (pending) {
        const Stopwatch wait;
        const StepReport report = read(*pending);
        metrics.step(report, pending_seconds + wait.seconds());
        stop = stop || report.stop_requested;
        state.skipped += report.skipped;
        skipped_in_a_row = report.skipped ? skipped_in_a_row + 1 : 0;
        if (skipped_in_a_row >= (config_.train.nan_policy == NanPolicy::stop ? 1 : config_.train.nan_limit)) {
          throw CommonFault(mesh_.world().rank() == 0,
                            text("the gradient was not finite for ", skipped_in_a_row, " steps in a row, last at step ", report.step,
                                 "; the newest checkpoint is of step ", saved));
        }
      }
      pending = std::move(next);
      pending_seconds = launch_seconds;
    };
    if (state.step == 0 && looks_every > 0) look();
    if (state.step == 0 && setup_.validation) metrics.validation(0, 0, trainer.validate(*setup_.validation, config_.validate.batches));
    while (state.step < config_.train.steps && !stop) {
      const Stopwatch launch;
      PendingReport launched = trainer.step();
      launch_seconds = launch.seconds();
      settle(std::move(launched));
      alive(state.step, "training");
      const bool last = state.step == config_.train.steps;
      const bool validates = setup_.validation && (state.step % config_.validate.every == 0 || last);
      const bool saves = state.step % config_.checkpoint.every == 0 || last;
      const bool looks = looks_every > 0 && (state.step % looks_every == 0 || last);
      if (!validates && !saves && !looks) continue;
      settle({});
      if (looks) look();
      if (validates) {
        metrics.validation(state.step, state.position, trainer.validate(*setup_.validation, config_.validate.batches));
      }
      if (saves) store();
      alive(state.step, "training");
    }
    settle({});
    const PeakMemory memory = peak_memory();
    const bool stopped = state.step < config_.train.steps;
    if (stopped && saved != state.step) store();
    metrics.end(state, memory, since_.seconds(), setup_.target.architecture.experts, checkpoints_ / step_directory(state.step));
    return stopped ? kRequeue : kDone;
  }

 private:
  // Tells the watchdog, and other jobs that want this directory, that this one is at work.
  void alive(int64_t step, const char* doing) {
    watchdog_.beat(step, doing);
    if (lock_) lock_->touch();
  }

  // The most that any rank took, and was planned to take.
  PeakMemory peak_memory() {
    const Weights& weights = stage_.weights();
    const device::Memory here = device::memory(weights.all().front().parameter.value.device());
    const RankMemory plan = rank_memory(weights.architecture(), config_, weights.layout(), mesh_.world().rank());
    const auto most = [&](int64_t bytes) { return mesh_.world().all_reduce(bytes, Reduce::max); };
    return {most(here.peak), most(plan.tensors()), here.total};
  }

  void save(Optimizer* optimizer, const TrainingState& state) {
    const auto folder = save_checkpoint(checkpoints_, mesh_, stage_.weights(), optimizer, state, setup_.record,
                                        [&] { alive(state.step, "writing a checkpoint"); });
    log::info("saved " + folder.string());
    if (mesh_.world().rank() == 0) remove_old(checkpoints_, config_.checkpoint.keep, config_.checkpoint.keep_every);
  }

  const RunConfig& config_;
  Mesh& mesh_;
  Setup& setup_;
  Watchdog& watchdog_;
  const RunLock* lock_;   ///< of rank 0; null on the others
  std::filesystem::path checkpoints_;
  Stage stage_;
  Stopwatch since_;
};

// "tensor 2, data 4, expert 8": the axes of more than one rank.
std::string describe(const Grid& grid) {
  std::string out;
  for (const Axis axis : {Axis::tensor, Axis::context, Axis::pipeline, Axis::data, Axis::expert, Axis::expert_tensor}) {
    if (grid.size(axis) > 1) out += text(out.empty() ? "" : ", ", name(axis), " ", grid.size(axis));
  }
  return out.empty() ? "one rank" : out;
}

}  // namespace

int run_training(const RunConfig& config, Mesh& mesh, Watchdog& watchdog) {
  const Communicator& world = mesh.world();
  shutdown::listen(config.run.signal);
  std::optional<Setup> setup;
  std::optional<RunLock> lock;
  at::Device device = at::kCPU;
  world.together([&] {                                                   // 1. read and check everything
    device = device::choose(config.run.device, host_rank());
    check_transport(device, config.run.transport);
    device::set_tf32(false);   // fp32 means fp32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says
  });
  if (!config.run.share_gpu) refuse_shared_gpus(world, device);
  world.together([&] { setup.emplace(prepare_run(config, mesh)); });
  agree(world, "the run directory", {{"the newest checkpoint", setup->resume ? setup->resume->folder().string() : "none"}});
  world.together([&] {                                                   // 2. the run directory is ours
    if (world.rank() == 0) {
      lock.emplace(setup->directory);
      const auto newest = newest_checkpoint(setup->directory);
      if (newest.has_value() != setup->resume.has_value() || (newest && *newest != setup->resume->folder())) {
        fail("another job wrote ", newest->string(), " into ", setup->directory.string(), " just now: submit this one again");
      }
      claim_run_directory(setup->directory, config);
    }
  });
  world.together([&] { watchdog.watch(setup->directory); });             // 3. from here on no wait is longer than run.timeout
  world.together([&] {
    constexpr double kAttributeCacheSeconds = 60;   // of NFS: a new file may be seen that late
    if (watchdog.sees(0, kAttributeCacheSeconds)) return;
    fail("run.directory = ", setup->directory.string(), " on host ", host_name(), " is another one than on rank 0's host: choose a ",
         "directory of a file system that all hosts share");
  });
  if (only_stores_step_zero(config, *setup)) {                           // block by block: no model, no gradients, no optimizer
    log::info("saved " + store_step_zero(config, *setup, world, [&](const char* doing) {
      watchdog.beat(0, doing);
      if (lock) lock->touch();
    }).string());
    return kDone;
  }
  watchdog.beat(-1, "connecting");
  mesh.prepare(device, config.run.transport);                            // 4. who talks to whom, by what
  watchdog.beat(-1, "starting");
  const ParameterCount count = count_parameters(setup->target.architecture);
  log::info(text(config.run.name, ": ", count.total, " parameters, ", count.active, " active per token; ", world.size(), " ranks (",
                 describe(mesh.grid()), ") on ", device::name(device), ", tensors by ", mesh.transport()));
  for (const Sampler::DataSet& data : setup->train->data_sets()) {
    if (data.masked) log::info(data.prefix + ": learned where its loss mask says so");
  }
  Run run(config, mesh, *setup, watchdog, lock ? &*lock : nullptr, device);
  if (!setup->resume) run.begin();                                       // 5. grow, certify, store step 0
  return run.train();                                                    // 6. train
}

}  // namespace upcycle
