#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/rng.hpp"
#include "parallel/mesh.hpp"
#include "support/decided_weights.hpp"
#include "support/numbers.hpp"
#include "train/layout_check.hpp"
#include "train/start.hpp"
#include "train/trainer.hpp"

namespace upcycle {

/// A tiny model and a run of it, whose numbers must not depend on how many ranks train it, nor on how.
struct TinyModel {
  std::string name;
  Architecture architecture;
  RunConfig run;
  int64_t tied_routers = 1;   ///< so many experts in a row share a router row, as the shards of a copy do
  uint64_t seed = 1;          ///< of weights and data; one at which no router ever chooses by a hair's breadth: tests assert it
  Fill weights = {};          ///< decided_weights, where there is none
};

/// Between them: tied and untied, layers all mixtures or mixed with dense ones, 1 and 2 key/value heads, granularity 4, a vocabulary
/// that does not divide, every scope of the balance loss, biases, dropped tokens. `depth` layers and sequences a step, 4 or 8: what a
/// pipeline and data-parallel ranks need, and no more. Eight heads, so that each axis of the layout can reach 8.
inline std::vector<TinyModel> tiny_models(int64_t depth) {
  const auto model = [depth](const char* name, uint64_t seed_of_4, uint64_t seed_of_8) {
    TinyModel m{.name = text(name, '-', depth), .architecture = {}, .run = {}, .seed = depth == 4 ? seed_of_4 : seed_of_8};
    Architecture& a = m.architecture;
    a.hidden = 32, a.layers = depth, a.heads = 8, a.kv_heads = 2, a.head_dim = 8, a.ffn = 48, a.vocab = 96, a.tied = true;
    a.experts = 8, a.top_k = 2, a.expert_ffn = 24;
    RunConfig& run = m.run;
    run.train.steps = 5, run.train.sequence = 32, run.train.global_batch = depth, run.train.micro_batch = 1;
    run.train.precision = Precision::fp32;
    run.optimizer.lr = 3e-4, run.optimizer.schedule = Schedule::constant, run.optimizer.router_lr_scale = 1.0;
    run.optimizer.eps = 1e-6;   // at 1e-8 a gradient that is zero but for rounding moves a weight by the whole learning rate, either way
    run.balance.aux = 0.05, run.balance.z = 0.01;
    run.moe_given = true, run.moe.experts = a.experts, run.moe.top_k = a.top_k;
    return m;
  };
  TinyModel tied = model("tied", 8, 22);

  TinyModel mixed = model("mixed", 7, 14);
  mixed.architecture.tied = false, mixed.architecture.kv_heads = 1, mixed.architecture.vocab = 91;
  mixed.architecture.dense_layers = {1, depth / 2}, mixed.architecture.renormalise = false;
  mixed.run.balance.scope = BalanceScope::sequence;

  TinyModel granular = model("granular", 22, 26);
  granular.architecture.experts = 16, granular.architecture.top_k = 4, granular.architecture.expert_ffn = 16;
  granular.run.moe.experts = 16, granular.run.moe.top_k = 4, granular.run.moe.granularity = 4;
  granular.run.balance.scope = BalanceScope::global;
  granular.tied_routers = 4;

  TinyModel biased = model("biased", 20, 10);
  biased.architecture.tied = false, biased.architecture.dense_layers = {0};
  biased.run.balance.bias_rate = 0.01, biased.run.balance.capacity_factor = 1.25;
  return {tied, mixed, granular, biased};
}

/// `model` with everything that a step needs, on the layout of `run.parallel`, trained on `run.data`, else on mock data. **Collective**
/// over the world.
class TinyTraining {
 public:
  TinyTraining(const TinyModel& model, const RunConfig& run, at::Device device = at::kCPU, Transport transport = Transport::automatic)
      : run_(run), mesh_(Grid(run.parallel, world_size())),
        stage_(model.architecture, make_layout(model.architecture, mesh_.grid(), run.parallel), mesh_,
               model_settings(run)) {
    mesh_.prepare(device, transport);
    stage_.weights().allocate(run.train.precision == Precision::bf16 ? at::kBFloat16 : at::kFloat, device, run.parallel.zero);
    fill_masters(stage_.weights(), model.weights ? model.weights : decided_weights(model.seed, model.tied_routers));
    optimizer_ = std::make_unique<Optimizer>(stage_.weights(), run_.optimizer, run_.router_lr_scale());
    const std::vector<Blend> mock = {{1.0, "mock"}};
    sampler_ = std::make_unique<Sampler>(run.data.train.empty() ? mock : run.data.train, std::array<int64_t, 3>{1, 0, 0}, Split::train,
                                         run.train.sequence, model.architecture.vocab, model.seed, run.data.documents);
    trainer_ = std::make_unique<Trainer>(run_, mesh_, stage_, *optimizer_, *sampler_);
  }

  StepReport step() { return read(trainer_->step()); }
  Trainer& trainer() { return *trainer_; }
  Stage& stage() { return stage_; }
  Optimizer& optimizer() { return *optimizer_; }
  const Mesh& mesh() const { return mesh_; }
  const Sampler& sampler() const { return *sampler_; }

  /// **Collective.** The smallest distance between the last chosen and the first rejected logit that differs from it in kind, over this
  /// rank's tokens of the next step; its layout has no more than data and expert ranks. Ties inside a copy are no choice.
  double smallest_gap(int64_t tied_routers = 1) {
    const Unrecorded guard;
    double smallest = std::numeric_limits<double>::infinity();
    const int64_t sequences = run_.train.micro_batch, stride = sequences * mesh_.grid().size(Axis::data);
    const at::Device device = stage_.weights().all().front().parameter.value.device();
    for (int64_t first = sequences * mesh_.here()[Axis::data]; first < run_.train.global_batch; first += stride) {
      const Positions positions = stage_.positions(sequences, run_.train.sequence);
      Tensor x = stage_.embed(sampler_->batch(trainer_->state().position + first, sequences).tokens_BS.to(device));
      for (Block& block : stage_.layers()) {
        const Tensor attended = block.attend(x, positions), h = block.feed_forward_input(attended);
        if (MoeLayer* moe = block.moe()) {
          Tensor logits = moe->router().logits(h);
          if (moe->router().state().bias_E.defined()) logits = logits + moe->router().state().bias_E;
          const Tensor copies = logits.view({logits.size(0), -1, tied_routers}).select(2, 0);
          const Tensor best = std::get<0>(copies.sort(int64_t{1}, /*descending=*/true));
          const int64_t chosen = stage_.architecture().top_k / tied_routers;
          smallest = std::min(smallest, (best.select(1, chosen - 1) - best.select(1, chosen)).min().item<double>());
        }
        x = attended + block.feed_forward(h, {});
      }
    }
    return smallest;
  }

 private:
  RunConfig run_;
  Mesh mesh_;
  Stage stage_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Sampler> sampler_;
  std::unique_ptr<Trainer> trainer_;
};

}  // namespace upcycle
