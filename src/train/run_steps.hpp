#pragma once
#include <chrono>
#include <optional>

#include "train/bad_steps.hpp"
#include "train/expert_watch.hpp"
#include "train/metrics.hpp"
#include "train/one_run.hpp"
#include "train/run_requests.hpp"
#include "train/step_trace.hpp"

namespace upcycle {

/// The steps of a run, and what is done between them: validation, looks at the experts, comparisons of replicas, checkpoints, roll-backs.
class Steps {
 public:
  /// **Collective.** The optimizer comes about, and the state: from the checkpoint that the run goes on from, or as step 0 begins. Throws
  /// DamagedCheckpoint, on all ranks alike, when that one is damaged; nothing has been written then.
  /// `profile`: the file of StepTrace; empty: none.
  explicit Steps(Run&, const std::filesystem::path& profile = {});

  /// **Collective.** To the last step, or to the request to stop. The exit code: kExitDone or kExitRequeue. A CommonFault when steps are bad too
  /// often, or replicas differ.
  int to_the_end();

 private:
  PendingReport step();
  /// Reads the report of the step before, and puts off that of the `next` one.
  void settle(std::optional<PendingReport> next);
  void look();
  std::optional<double> validate();
  void store(std::optional<double> validation_loss = {});
  void compare_replicas();
  /// Back to the last good checkpoint, and on behind the data of the bad steps, as PaLM did (Chowdhery et al., 2204.02311, section 5.1).
  void roll_back();
  bool may_roll_back() const;
  [[noreturn]] void give_up(const std::string& why) const;
  void put_back(TrainingState);
  PeakMemory peak_memory();
  int64_t gpu_memory() const;

  Run& run_;
  const RunConfig& config_;
  Optimizer optimizer_;
  Trainer trainer_;
  TrainingState& state_;
  std::optional<Metrics> metrics_;
  ExpertWatch experts_;
  int64_t looks_every_;
  RunRequests requests_;
  Word word_;                   ///< for the next step
  std::optional<PendingReport> pending_;
  using Clock = std::chrono::steady_clock;
  Clock::time_point since_;     ///< when the numbers of the step before arrived; where nothing was pending, when the step at hand began
  StepTrace trace_;
  BadSteps bad_;
  int64_t saved_ = -1;          ///< the step of the newest checkpoint; -1: none of this start
  int64_t compared_ = -1;       ///< the step after which replicas last agreed; -1: not compared yet
  int64_t rolled_back_ = 0;
  bool stop_ = false, save_ = false;   ///< some rank was asked for it
  bool took_memory_ = false;           ///< for checkpoints, see Saver
};

}  // namespace upcycle
