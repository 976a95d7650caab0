#include "train/run.hpp"

#include <c10/util/Exception.h>

#include <stdexcept>

#include "base/exit_code.hpp"
#include "base/log.hpp"
#include "base/shutdown.hpp"
#include "checkpoint/first_rank.hpp"
#include "device/device.hpp"
#include "parallel/gpu_sharing.hpp"
#include "train/agreement.hpp"
#include "train/full_memory.hpp"
#include "train/layout_check.hpp"
#include "train/restore.hpp"
#include "train/run_directory.hpp"
#include "train/run_requests.hpp"
#include "train/run_steps.hpp"
#include "train/setup.hpp"
#include "train/start.hpp"
#include "train/step_trace.hpp"
#include "train/step_zero.hpp"

namespace upcycle {
namespace {

// **Collective.** All that is read and checked before anything is allocated or written, alike on all ranks.
void set_up(std::optional<Setup>& setup, const RunConfig& config, const Mesh& mesh, bool accept_changes) {
  setup.reset();
  mesh.world().together([&] { setup.emplace(prepare_run(config, mesh.world().size(), mesh.world().rank() == 0, accept_changes)); });
  agree(mesh.world(), "the run directory", {{"the newest checkpoint", setup->resume ? setup->resume->folder().string() : "none"}});
}

}  // namespace

int run_training(const RunConfig& config, Mesh& mesh, Watchdog& watchdog, bool accept_changes, const std::filesystem::path& profile) {
  const Communicator& world = mesh.world();
  shutdown::listen(config.run.signal);
  std::optional<Setup> setup;
  std::optional<RunLock> lock;
  at::Device device = at::kCPU;
  world.together([&] {                                                   // 1. read and check everything
    refuse_stop_file(config.run.directory);
    if (!profile.empty()) StepTrace::check(profile);
    device = device::choose(config.run.device, host_rank());
    check_transport(device, config.run.transport);
    device::set_deterministic(config.train.deterministic);
    device::set_tf32(false);   // fp32 means fp32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says
  });
  if (!config.run.share_gpu) refuse_shared_gpus(world, device);
  set_up(setup, config, mesh, accept_changes);
  std::optional<Unfinished> unfinished;
  world.together([&] {                                                   // 2. the run directory is ours
    if (world.rank() == 0) {
      lock.emplace(setup->directory);
      const auto newest = newest_checkpoint(setup->directory);
      if (newest.has_value() != setup->resume.has_value() || (newest && *newest != setup->resume->folder())) {
        fail("another job wrote ", newest->string(), " into ", setup->directory.string(), " just now: submit this one again");
      }
      if (!setup->resume || setup->resume->manifest().step < config.train.steps) unfinished.emplace(setup->directory);
      // What is gone on from may turn out to be damaged when its values are read: a refusal leaves the run file of the last start.
      if (!setup->resume) claim_run_directory(setup->directory, config);
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
    if (unfinished) unfinished->begun();
    if (world.rank() == 0) mark_finished(setup->directory, 0);
    return kExitDone;
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
  try {
    for (;;) {
      Run run(config, mesh, *setup, watchdog, lock ? &*lock : nullptr, device);
      if (!setup->resume) run.begin();                                     // 5. grow, certify, store step 0
      std::optional<Steps> steps;
      std::string damage;
      try {
        steps.emplace(run, profile);
      } catch (const DamagedCheckpoint& error) {
        if (!setup->resume || !fall_back(setup->resume->folder(), error.what(), world)) throw;
        damage = error.what();
      }
      if (damage.empty()) {
        on_first_rank(world, [&] {
          if (setup->resume) claim_run_directory(setup->directory, config);
        });
        if (unfinished) unfinished->begun();
        return steps->to_the_end();                                        // 6. train
      }
      set_up(setup, config, mesh, accept_changes);   // what is left has to pass all the checks, too
    }
  } catch (const c10::OutOfMemoryError& error) {
    const Architecture& architecture = setup->target.architecture;
    throw std::runtime_error(memory_is_full(architecture, config, make_layout(architecture, mesh.grid(), config.parallel), world.rank(),
                                            device::memory(device).total, error.what_without_backtrace()));
  }
}

}  // namespace upcycle
