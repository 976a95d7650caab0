#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "config/run_config.hpp"
#include "data/sampler.hpp"
#include "device/device.hpp"
#include "model/stage.hpp"
#include "parallel/mesh.hpp"
#include "train/optimizer.hpp"
#include "train/replicas.hpp"

namespace upcycle {

/// What is stored beside the weights so that a run goes on as if it had never stopped. All randomness is a function of the seed and
/// these numbers.
struct TrainingState {
  int64_t step = 0;        ///< steps done
  int64_t position = 0;    ///< the next sample of the training stream
  int64_t skipped = 0;     ///< steps whose gradient was not finite
};

/// A step's numbers on their way from the device. Reading them waits for that step, so the trainer's loop does it one step late.
struct PendingReport {
  int64_t step = 0;
  int64_t position = 0;    ///< samples consumed after this step
  double lr = 0.0;
  device::HostCopy numbers;    ///< fp64, see Numbers in trainer.cpp
  device::HostCopy count_LE;   ///< int64, choices per expert in each MoE layer of this stage, over all data; undefined when dense
};

/// One step, for people and for metrics.jsonl. The same on all ranks of a stage.
struct StepReport {
  int64_t step = 0, position = 0;
  double loss = 0.0, lr = 0.0, gradient_norm = 0.0;
  double aux_loss = 0.0, z_loss = 0.0;          ///< mean over MoE layers and micro-batches, without coefficients
  bool skipped = false;                         ///< the gradient was not finite; nothing was changed
  bool stop_requested = false;                  ///< some rank was asked to stop
  std::vector<std::vector<int64_t>> tokens_per_expert;
  double load_max_over_mean = 0.0;              ///< the fullest expert against the mean, averaged over layers; 0 when dense
};
StepReport read(const PendingReport&);

/// The training step: the page everyone reads.
class Trainer {
 public:
  /// **Collective.** The referenced objects outlive the trainer.
  Trainer(const RunConfig&, const Mesh&, Stage&, Optimizer&, const Sampler& train);

  /// **Collective.** One update on global_batch sequences.
  PendingReport step();
  /// **Collective.** Mean cross entropy per token over the first `batches` global batches of `sampler`; no graph, no statistics.
  double validate(const Sampler& sampler, int64_t batches);

  TrainingState& state() noexcept { return state_; }

 private:
  Tensor accumulate_gradients();
  Batch micro_batch(const Sampler&, int64_t first_sample) const;

  const RunConfig& config_;
  const Mesh& mesh_;
  Stage& stage_;
  Optimizer& optimizer_;
  const Sampler& sampler_;
  Replicas replicas_;
  TrainingState state_;
  BalanceLoss balance_;            ///< coefficients, divided by the micro-batches of a step
  int64_t micro_batches_;          ///< of one rank in a step
};

}  // namespace upcycle
