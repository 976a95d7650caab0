#include "train/run_steps.hpp"

#include "base/exit_code.hpp"
#include "base/fault.hpp"
#include "base/log.hpp"
#include "base/shutdown.hpp"
#include "base/trace_range.hpp"
#include "device/device.hpp"
#include "model/flops.hpp"
#include "train/agreement.hpp"
#include "train/memory_plan.hpp"
#include "train/restore.hpp"

namespace upcycle {

Steps::Steps(Run& run, const std::filesystem::path& profile)
    : run_(run),
      config_(run.config),
      optimizer_(run.stage.weights(), run.config.optimizer, run.config.router_lr_scale()),
      trainer_(run.config, run.mesh, run.stage, optimizer_, *run.setup.train, &run.saver),
      state_(trainer_.state()),
      experts_(run.stage.weights(), run.mesh, run.setup.record),
      looks_every_(run.setup.target.architecture.is_moe() ? run.config.log.experts_every : 0),
      requests_(run.setup.directory, run.mesh.world().rank() == 0),
      bad_(run.config.train) {
  state_.routers = run_.setup.routers;
  if (run_.setup.resume) {
    log::info("resuming from " + run_.setup.resume->folder().string());
    put_back(restore_together(*run_.setup.resume, run_.mesh.world(), run_.stage.weights(), optimizer_));
  } else {
    if (config_.upcycle.optimizer != Moments::reset) run_.carry_moments(optimizer_, state_);
    put_back(state_);
  }
  saved_ = run_.setup.resume || state_.step == 0 ? state_.step : -1;
  const at::Device device = run_.stage.weights().all().front().parameter.value.device();
  const Communicator& world = run_.mesh.world();
  std::vector<std::string> hosts;
  for (const Process& process : gather_processes(world)) hosts.push_back(process.host);
  metrics_.emplace(config_, run_.setup.directory, world.rank(), std::move(hosts),
                   Scale{flops_per_token(run_.setup.target.architecture, config_.train.sequence),
                         device.is_cuda() ? peak_flops(device::name(device)) * world.size() : 0.0},
                   state_);
  if (profile.empty()) return;
  world.together([&] { trace_ = StepTrace(profile, world.rank(), world.size(), device, state_.step, config_.train.steps); });
}

void Steps::put_back(TrainingState state) {
  state_ = std::move(state);
  run_.mesh.world().together([&] {   // manifests may be damaged, too
    trainer_.balance().restore(state_.routers);
    trainer_.spikes().restore(state_.losses);
  });
}

int Steps::to_the_end() {
  const bool has_validation = run_.setup.validation.has_value();
  if (state_.step == 0 && looks_every_ > 0) look();
  if (state_.step == 0 && has_validation) validate();
  while (state_.step < config_.train.steps && !stop_) {
    requests_.look();
    if (requests_.stop()) shutdown::request();
    word_.save = requests_.save();
    if (trace_.begins(state_.step)) {
      settle({});
      trace_.begin();
    }
    if (!pending_) since_ = Clock::now();
    settle(step());
    if (!std::exchange(took_memory_, true)) run_.saver.take_memory(run_.stage.weights(), optimizer_);
    run_.alive(state_.step, "training");
    if (trace_.ends(state_.step)) {
      settle({});
      trace_.end();
      run_.alive(state_.step, "training");
    }
    requests_.published(run_.saver.published());
    if (bad_.too_many()) {
      roll_back();
      continue;
    }
    const bool last = state_.step == config_.train.steps;
    const auto is_due = [&](int64_t every) { return every > 0 && (state_.step % every == 0 || last); };
    const bool compares = is_due(config_.train.check_replicas), looks = is_due(looks_every_);
    const bool validates = has_validation && is_due(config_.validate.every), saves = is_due(config_.checkpoint.every) || save_;
    if (!compares && !looks && !validates && !saves) continue;
    settle({});
    if (bad_.too_many()) {
      roll_back();
      continue;
    }
    if (compares) compare_replicas();
    if (looks) look();
    std::optional<double> loss;
    if (validates) loss = validate();
    if (saves) store(loss);
    run_.alive(state_.step, "training");
  }
  settle({});
  if (trace_.recording()) trace_.end();   // stopped before its last step
  if (bad_.too_many() && !may_roll_back()) give_up(bad_.words());   // asked to stop, it still says why it would have ended
  const PeakMemory memory = peak_memory();
  const bool stopped = state_.step < config_.train.steps;
  if (stopped && saved_ != state_.step) store();
  run_.saver.finish();
  requests_.saving(saved_);   // what came too late for a step of its own
  requests_.published(run_.saver.published());
  if (!stopped && run_.mesh.world().rank() == 0) mark_finished(run_.setup.directory, state_.step);
  metrics_->end(state_, memory, run_.since.seconds(), run_.setup.target.architecture.experts, run_.checkpoints / step_directory(state_.step));
  return stopped ? kExitRequeue : kExitDone;
}

PendingReport Steps::step() {
  const TraceRange range("step", state_.step + 1);
  return trainer_.step(word_);
}

// Reports are read one step late, so that the host never waits for the step that it has just launched. A step's seconds are those from
// the arrival of the numbers of the step before to that of its own, all that the host does between two steps included: the device's own
// period where the host is ahead of it. Validation and checkpoints do not count, for nothing is pending there.
void Steps::settle(std::optional<PendingReport> next) {
  if (pending_) {
    const StepReport report = read(*pending_);
    const Clock::time_point arrived = pending_->arrived.value_or(Clock::now());
    const double seconds = std::chrono::duration<double>(arrived - std::exchange(since_, arrived)).count();
    metrics_->step(report, seconds, metrics_->is_told(report.step) ? gpu_memory() : 0);
    if (pending_->own_time) word_.own_seconds = pending_->own_time->seconds();
    stop_ = stop_ || report.stop_requested;
    save_ = save_ || report.save_requested;
    state_.skipped += report.skipped;
    bad_.add(report);
    run_.saver.step(report.saver_writes, report.saver_failed);
  }
  pending_ = std::move(next);
}

void Steps::look() {
  metrics_->experts(state_.step, state_.position, experts_.look([&] { run_.alive(state_.step, "looking at the experts"); }));
}

std::optional<double> Steps::validate() {
  run_.alive(state_.step, "validating");
  const double loss = trainer_.validate(*run_.setup.validation, config_.validate.batches);
  metrics_->validation(state_.step, state_.position, loss);
  return std::isfinite(loss) ? std::optional(loss) : std::nullopt;
}

void Steps::store(std::optional<double> validation_loss) {
  state_.routers = trainer_.balance().state();
  state_.losses = trainer_.spikes().state();
  state_.validation_loss = validation_loss;
  // While steps are bad, checkpoints from before them are not given up for those that they leave.
  requests_.saving(state_.step);
  run_.save(&optimizer_, state_, /*removes=*/!bad_.any());
  saved_ = state_.step;
  save_ = false;
}

void Steps::compare_replicas() {
  run_.alive(state_.step, "comparing replicas");
  const std::vector<std::string> lines = trainer_.differing_replicas();
  if (lines.empty()) {
    compared_ = state_.step;
    return;
  }
  constexpr size_t kShown = 20;
  std::string list;
  for (size_t i = 0; i < std::min(kShown, lines.size()); ++i) list += "\n  " + lines[i];
  if (lines.size() > kShown) list += text("\n  and ", lines.size() - kShown, " more");
  const std::string since = compared_ < 0 ? "They were not compared before in this start" : text("They were equal after step ", compared_);
  throw CommonFault(run_.mesh.world().rank() == 0,
                    text("after step ", state_.step, " weights that several ranks hold alike are not equal (train.check_replicas):", list, "\n", since,
                         ": a device, a memory or a network is not sound. Checkpoints of later steps may hold either"));
}

bool Steps::may_roll_back() const { return config_.train.nan_policy != NanPolicy::stop && rolled_back_ < config_.train.rollbacks; }

void Steps::give_up(const std::string& why) const {
  const std::string before = rolled_back_ > 0 ? text("; the run rolled back ", rolled_back_, rolled_back_ == 1 ? " time" : " times", " before (train.rollbacks)") : "";
  throw CommonFault(run_.mesh.world().rank() == 0, text(why, "; the newest checkpoint is of step ", saved_, before));
}

void Steps::roll_back() {
  const Communicator& world = run_.mesh.world();
  run_.saver.finish();   // it may be reading what is about to be put back
  pending_.reset();   // of a step that was launched before the report was there: it will not have been
  if (!may_roll_back()) give_up(bad_.words());
  std::optional<TrainingState> good;
  while (!good) {
    const auto chosen = last_good_checkpoint(run_.checkpoints, bad_, world);
    if (!chosen) give_up(bad_.words() + ", and there is no valid checkpoint from before them to roll back to");
    std::optional<CheckpointReader> reader;
    world.together([&] { reader.emplace(*chosen); });
    try {
      good = restore_together(*reader, world, run_.stage.weights(), optimizer_);
    } catch (const DamagedCheckpoint& damage) {
      if (!fall_back(*chosen, damage.what(), world)) throw;
    }
  }
  run_.alive(good->step, "rolling back");
  world.together([&] {   // before anything else is stored: started again, the run goes on from here, too
    if (world.rank() != 0) return;
    std::string removed;
    for (const auto& checkpoint : remove_after(run_.checkpoints, good->step)) removed += " " + checkpoint.filename().string();
    log::warning(text(bad_.words(), ": back to the checkpoint of step ", good->step, ", and on at sample ", bad_.position(), ", behind their data",
                      removed.empty() ? "" : "; removed" + removed));
  });
  good->position = bad_.position();
  put_back(std::move(*good));
  metrics_->rolled_back(state_, bad_);
  saved_ = state_.step;
  compared_ = std::min(compared_, state_.step);
  bad_ = BadSteps(config_.train);
  ++rolled_back_;
}

int64_t Steps::gpu_memory() const {
  const at::Device device = run_.stage.weights().all().front().parameter.value.device();
  return device.is_cuda() ? device::memory(device).peak : 0;
}

// The most that any rank took, and was planned to take.
PeakMemory Steps::peak_memory() {
  const Weights& weights = run_.stage.weights();
  const Communicator& world = run_.mesh.world();
  const device::Memory here = device::memory(weights.all().front().parameter.value.device());
  const RankMemory plan = rank_memory(weights.architecture(), config_, weights.layout(), world.rank());
  const auto most = [&](int64_t bytes) { return world.all_reduce(bytes, Reduce::max); };
  return {most(here.peak), most(plan.tensors()), here.total};
}

}  // namespace upcycle
