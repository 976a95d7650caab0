#pragma once
#include <chrono>
#include <filesystem>

#include "base/watchdog.hpp"
#include "checkpoint/run_lock.hpp"
#include "model/stage.hpp"
#include "train/saver.hpp"
#include "train/setup.hpp"

namespace upcycle {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// A run that was set up: its model in memory, its directory, and how it begins. Members in the order in which they come about; the
/// referenced objects outlive it.
class Run {
 public:
  /// **Collective.** Allocates the weights. `lock`: of rank 0; null on the others.
  Run(const RunConfig&, Mesh&, Setup&, Watchdog&, const RunLock* lock, at::Device);

  /// **Collective.** Step 0: the weights come from the source, are certified, and are stored before anything is trained (without moments:
  /// where some are carried over, carry_moments stores it).
  void begin();
  /// **Collective.** The source's moments, as the recipe spreads them. They are part of step 0: a run that stops before its next
  /// checkpoint has them still.
  void carry_moments(Optimizer&, const TrainingState&);

  /// **Collective.** Stores a checkpoint, see Saver::save.
  void save(Optimizer* optimizer, const TrainingState& state, bool removes = true) { saver.save(stage.weights(), optimizer, state, setup.record, removes); }
  /// Tells the watchdog, and other jobs that want this directory, that this one is at work.
  void alive(int64_t step, const char* doing);

  const RunConfig& config;
  Mesh& mesh;
  Setup& setup;
  const std::filesystem::path checkpoints;
  Stage stage;
  Saver saver;
  const Stopwatch since;

 private:
  Watchdog& watchdog_;
  const RunLock* lock_;
  int64_t step_ = 0;   ///< of which alive() last heard
};

}  // namespace upcycle
