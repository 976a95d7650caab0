#pragma once
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "config/run_config.hpp"
#include "data/sampler.hpp"
#include "device/device.hpp"
#include "model/stage.hpp"
#include "parallel/mesh.hpp"
#include "parallel/own_time.hpp"
#include "train/balance.hpp"
#include "train/loss_spikes.hpp"
#include "train/optimizer.hpp"
#include "train/pipeline.hpp"
#include "train/replicas.hpp"

namespace upcycle {

class Saver;

/// What is stored beside the weights so that a run goes on as if it had never stopped. All randomness is a function of the seed and
/// these numbers.
struct TrainingState {
  int64_t step = 0;        ///< steps done
  int64_t position = 0;    ///< the next sample of the training stream
  int64_t skipped = 0;     ///< steps that changed nothing: the gradient was not finite, or the loss a spike
  nlohmann::json routers;  ///< what Balance::state said when it was stored; null: nothing
  nlohmann::json losses;   ///< what LossSpikes::state said when it was stored; null: nothing
  std::optional<double> validation_loss;   ///< of these weights, where they were validated
};

/// What a rank tells all others with its next step.
struct Word {
  bool save = false;          ///< a checkpoint is wanted
  double own_seconds = 0.0;   ///< of work of its own in the newest step of which it knows (PendingReport::own_time); 0: of none
};

/// A step's numbers on their way from the device. Reading them waits for that step, so the trainer's loop does it one step late.
struct PendingReport {
  int64_t step = 0;
  int64_t position = 0;    ///< samples consumed after this step
  double lr = 0.0;
  device::HostCopy numbers;    ///< fp64, see Numbers in trainer.cpp
  device::HostCopy count_LX;   ///< see Balance::counts; undefined when dense
  device::HostCopy spike;      ///< bool, see LossSpikes::judge; undefined where nobody asks
  std::optional<int64_t> learned;   ///< see StepReport
  int ranks = 1;                    ///< of the world
  /// When they were there: on a CPU, where that is before the step returns. Elsewhere who reads them learns it by waiting.
  std::optional<std::chrono::steady_clock::time_point> arrived;
  std::optional<own_time::Stretch> own_time;   ///< this rank's forward and backward passes; its seconds are known when the numbers are
};

/// One step, for people and for metrics.jsonl. The same on all ranks.
struct StepReport : ExpertLoad {
  int64_t step = 0, position = 0;
  double loss = 0.0, lr = 0.0, gradient_norm = 0.0;   ///< the loss is the mean over the learned tokens; not a number where there were none
  std::optional<int64_t> learned;               ///< tokens that counted as labels, where some data have a loss mask
  double aux_loss = 0.0, z_loss = 0.0;          ///< mean over MoE layers and micro-batches, without coefficients
  double router_entropy = 0.0;                  ///< of the routers' probabilities, in nats; mean over tokens and MoE layers
  std::vector<double> router_entropy_of_layer;  ///< the same of each layer with experts
  bool skipped = false;                         ///< the gradient was not finite, or the loss a spike; nothing was changed
  bool spike = false;                           ///< the loss was one
  bool stop_requested = false;                  ///< some rank was asked to stop
  bool saver_writes = false, saver_failed = false;   ///< Saver::writes and failed, of any rank, when the step ended
  bool save_requested = false;                  ///< Word::save, of any rank
  std::vector<double> own_seconds;              ///< Word::own_seconds, by rank; empty on a single rank
};
StepReport read(const PendingReport&);

/// A model's way through the samples of a stream: what training and validation share. Needs values, no gradients.
class ForwardPass {
 public:
  /// The referenced objects outlive this one.
  ForwardPass(const RunConfig&, const Mesh&, Stage&);

  /// **Collective.** Mean cross entropy per learned token over the first `batches` global batches of `sampler`, not a number where
  /// there is none; no graph, no statistics.
  double validate(const Sampler& sampler, int64_t batches);

 protected:
  /// A micro-batch on this rank's device, of each sequence what the rank holds.
  struct MicroBatch {
    Batch batch;
    Positions positions;
    int64_t chunks_left;   ///< of this stage's, that have not computed it
  };

  /// The micro-batch that begins with `first_sample` through one chunk of the model: token rows, or, after the last chunk, `weight` times
  /// the sum of the learned tokens' losses (see Stage::loss).
  Tensor forward(const Sampler&, int64_t first_sample, int chunk, const Tensor& x_TW, const RouterContext&, double weight);
  bool is_last(int chunk) const;
  /// Read once, for all chunks of this stage.
  MicroBatch micro_batch(const Sampler&, int64_t first_sample);

  const RunConfig& config_;
  const Mesh& mesh_;
  Stage& stage_;
  Pipeline pipeline_;
  int64_t micro_batches_;          ///< of one rank in a step
  std::map<int64_t, MicroBatch> loaded_;   ///< those on their way through this stage's chunks, by their first sample
};

/// The training step: the page everyone reads.
class Trainer : public ForwardPass {
 public:
  /// **Collective.** The referenced objects outlive the trainer.
  /// `saver`: may be reading weights and moments meanwhile; null for none.
  Trainer(const RunConfig&, const Mesh&, Stage&, Optimizer&, const Sampler& train, const Saver* saver = nullptr);

  /// **Collective.** One update on global_batch sequences. Of a step in which no token is learned the cross entropy has no gradient:
  /// weights move by what balance losses, weight decay and AdamW's moments say.
  PendingReport step(const Word& = {});

  /// **Collective.** Replicas::differences, all ranks' lines on each.
  std::vector<std::string> differing_replicas();

  TrainingState& state() noexcept { return state_; }
  Balance& balance() noexcept { return balance_; }
  LossSpikes& spikes() noexcept { return spikes_; }

 private:
  /// `learned`: labels of the step's global batch.
  Tensor accumulate_gradients(int64_t learned);

  Optimizer& optimizer_;
  const Sampler& sampler_;
  const Saver* saver_;
  Replicas replicas_;
  TrainingState state_;
  Balance balance_;
  LossSpikes spikes_;
};

}  // namespace upcycle
