#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "config/run_config.hpp"
#include "data/sampler.hpp"
#include "device/device.hpp"
#include "model/stage.hpp"
#include "parallel/mesh.hpp"
#include "train/balance.hpp"
#include "train/optimizer.hpp"

namespace upcycle {

/// What is stored beside the weights so that a run goes on as if it had never stopped. All randomness is a function of the seed and
/// these numbers.
struct TrainingState {
  int64_t step = 0;        ///< steps done
  int64_t position = 0;    ///< the next sample of the training stream
  int64_t skipped = 0;     ///< steps whose gradient was not finite
  nlohmann::json routers;  ///< what Balance::state said when it was stored; null: nothing
};

/// A step's numbers on their way from the device. Reading them waits for that step, so the trainer's loop does it one step late.
struct PendingReport {
  int64_t step = 0;
  int64_t position = 0;    ///< samples consumed after this step
  double lr = 0.0;
  device::HostCopy numbers;    ///< fp64, see Numbers in trainer.cpp
  device::HostCopy count_LX;   ///< see Balance::counts; undefined when dense
};

/// One step, for people and for metrics.jsonl. The same on all ranks.
struct StepReport : ExpertLoad {
  int64_t step = 0, position = 0;
  double loss = 0.0, lr = 0.0, gradient_norm = 0.0;
  double aux_loss = 0.0, z_loss = 0.0;          ///< mean over MoE layers and micro-batches, without coefficients
  double router_entropy = 0.0;                  ///< of the routers' probabilities, in nats; mean over tokens and MoE layers
  bool skipped = false;                         ///< the gradient was not finite; nothing was changed
  bool stop_requested = false;                  ///< some rank was asked to stop
};
StepReport read(const PendingReport&);

/// The training step: the page everyone reads.
class Trainer {
 public:
  /// The referenced objects outlive the trainer.
  Trainer(const RunConfig&, const Mesh&, Stage&, Optimizer&, const Sampler& train);

  /// **Collective.** One update on global_batch sequences.
  PendingReport step();
  /// **Collective.** Mean cross entropy per token over the first `batches` global batches of `sampler`; no graph, no statistics.
  double validate(const Sampler& sampler, int64_t batches);

  TrainingState& state() noexcept { return state_; }
  Balance& balance() noexcept { return balance_; }

 private:
  Tensor accumulate_gradients();
  Batch micro_batch(const Sampler&, int64_t first_sample) const;

  const RunConfig& config_;
  const Mesh& mesh_;
  Stage& stage_;
  Optimizer& optimizer_;
  const Sampler& sampler_;
  TrainingState state_;
  Balance balance_;
  int64_t micro_batches_;          ///< of one rank in a step
};

/// **Collective.** Sums each gradient over the ranks that hold the same slice.
void reduce_gradients(Weights&, const Mesh&);

}  // namespace upcycle
