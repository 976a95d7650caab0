#include "train/trainer.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/shutdown.hpp"
#include "train/context_batch.hpp"
#include "train/learning_rate.hpp"
#include "train/saver.hpp"

namespace upcycle {
namespace {

// PendingReport::numbers, each a plain sum over the world.
enum Numbers { kSquaredNorm, kLoss, kStop, kWrites, kFailed, kSave, kAux, kZ, kEntropy, kEntropies };   // kEntropies: the first of as many as layers with experts; then a rank's own_seconds each

}  // namespace

ForwardPass::ForwardPass(const RunConfig& config, const Mesh& mesh, Stage& stage)
    : config_(config), mesh_(mesh), stage_(stage),
      pipeline_(mesh.along(Axis::pipeline), stage.weights().layout(),
                [this] { return stage_.room(config_.train.micro_batch * config_.train.sequence / mesh_.grid().size(Axis::context)); }) {
  micro_batches_ = config.train.global_batch / config.train.micro_batch / mesh.grid().size(Axis::data);
}

Trainer::Trainer(const RunConfig& config, const Mesh& mesh, Stage& stage, Optimizer& optimizer, const Sampler& train, const Saver* saver)
    : ForwardPass(config, mesh, stage), optimizer_(optimizer), sampler_(train), saver_(saver), replicas_(stage.weights(), mesh), balance_(config, mesh, stage),
      spikes_(config.train.spike, stage.weights().all().front().parameter.value.device()) {}

PendingReport Trainer::step(const Word& word) {
  own_time::start(stage_.weights().all().front().parameter.value.device());
  optimizer_.zero_gradients();
  const int64_t learned = sampler_.learned(state_.position, config_.train.global_batch);
  const Tensor loss = accumulate_gradients(learned);                       // 1. forward and backward of every micro-batch
  PendingReport report;
  report.own_time = own_time::finish();
  replicas_.sum_gradients();                                               // 2. sum each gradient over who holds the same slice

  report.step = ++state_.step;
  report.position = state_.position += config_.train.global_batch;
  if (sampler_.masked()) report.learned = learned;
  const auto said = [&](bool yes) { return at::full({}, yes ? 1.0 : 0.0, loss.options()); };
  report.ranks = mesh_.world().size();
  const Tensor own_R = at::zeros({report.ranks}, loss.options());
  own_R[mesh_.world().rank()].fill_(word.own_seconds);
  const auto arrived = [this](size_t bucket) { replicas_.wait_for_sum(bucket); };   // the norm is taken beside the last sums
  Tensor numbers = at::cat({at::stack({optimizer_.squared_norm_share(arrived), loss, said(shutdown::requested()), said(saver_ && saver_->writes()),
                                       said(saver_ && saver_->failed()), said(word.save)}), balance_.measures(), own_R});
  mesh_.world().all_reduce(numbers);                                       // 3. the whole model's norm; what ranks have to say rides along
  const Tensor count_LX = balance_.counts();
  if (count_LX.defined()) report.count_LX = device::HostCopy(count_LX);

  report.numbers = device::HostCopy(numbers);
  report.lr = learning_rate(config_.optimizer, config_.train.steps, report.step);
  Tensor good = numbers[kSquaredNorm].isfinite();
  if (config_.train.spike > 0 && learned > 0) {                            // a bad step changes nothing; the host hears of it later
    const Tensor spike = spikes_.judge(numbers[kLoss], good);
    report.spike = device::HostCopy(spike);
    good = good.logical_and(spike.logical_not());
  }
  if (saver_) saver_->before_update();
  const auto share = [this](size_t bucket) { replicas_.share_values(bucket); };
  optimizer_.step(report.lr, numbers[kSquaredNorm], good, share);          // 4. clip by that norm, then move
  balance_.update(count_LX, good);                                         // 5. move the routers' biases towards balance
  if (loss.is_cpu()) report.arrived = std::chrono::steady_clock::now();
  return report;
}

std::vector<std::string> Trainer::differing_replicas() {
  const std::vector<std::string> own = replicas_.differences();
  if (mesh_.world().all_reduce(static_cast<int64_t>(own.size()), Reduce::max) == 0) return {};
  std::vector<std::string> all;
  for (const std::string& told : mesh_.world().all_gather(nlohmann::json(own).dump())) {
    for (const std::string line : nlohmann::json::parse(told)) all.push_back(line);
  }
  return all;
}

Tensor Trainer::accumulate_gradients(int64_t learned) {
  loaded_.clear();   // a pass before this one may have thrown
  const int64_t data_rank = mesh_.here()[Axis::data], data_size = mesh_.grid().size(Axis::data);
  // Divided by the step's learned tokens once, here; from now on every reduction is a plain sum.
  const double weight = 1.0 / static_cast<double>(std::max<int64_t>(1, learned));
  const Tensor loss = pipeline_.train(micro_batches_, [&](int64_t number, int chunk, const Tensor& x) {
    // Micro-batch j of the step is the same sequences on any number of ranks; rank r takes every size-th of them.
    const int64_t j = number * data_size + data_rank;
    const int64_t first = state_.position + j * config_.train.micro_batch;
    return forward(sampler_, first, chunk, x, balance_.context(first), weight);
  });
  return mesh_.here()[Axis::tensor] == 0 ? loss : at::zeros_like(loss);   // all tensor ranks know it; it counts once
}

double ForwardPass::validate(const Sampler& sampler, int64_t batches) {
  loaded_.clear();
  const int64_t data_rank = mesh_.here()[Axis::data], data_size = mesh_.grid().size(Axis::data);
  const int64_t sequences = batches * config_.train.global_batch;
  Tensor loss = pipeline_.evaluate(batches * micro_batches_, [&](int64_t number, int chunk, const Tensor& x) {
    return forward(sampler, (number * data_size + data_rank) * config_.train.micro_batch, chunk, x, {}, /*weight=*/1.0);
  });
  if (mesh_.here()[Axis::tensor] != 0) loss.zero_();
  mesh_.world().all_reduce(loss);   // stages before the last have zeros
  return loss.item<double>() / static_cast<double>(sampler.learned(0, sequences));   // 0 / 0 is not a number: there is no mean
}

Tensor ForwardPass::forward(const Sampler& sampler, int64_t first_sample, int chunk, const Tensor& x_TW, const RouterContext& context,
                            double weight) {
  const MicroBatch here = micro_batch(sampler, first_sample);
  const Batch& batch = here.batch;
  const Tensor y_TW = stage_.blocks(chunk == 0 ? stage_.embed(batch.tokens_BS) : x_TW, here.positions, context, chunk);
  if (!is_last(chunk)) return y_TW;
  const Tensor weight_BS = at::full(batch.labels_BS.sizes(), weight, batch.labels_BS.options().dtype(at::kFloat));
  return stage_.loss(y_TW, batch.labels_BS, batch.learn_BS.defined() ? weight_BS.mul(batch.learn_BS) : weight_BS);
}

bool ForwardPass::is_last(int chunk) const { return chunk == stage_.weights().layout().chunks() - 1; }

ForwardPass::MicroBatch ForwardPass::micro_batch(const Sampler& sampler, int64_t first_sample) {
  auto found = loaded_.find(first_sample);
  if (found == loaded_.end()) {
    const Batch batch = of_context_rank(sampler.batch(first_sample, config_.train.micro_batch), mesh_.grid().size(Axis::context),
                                        mesh_.here()[Axis::context]);
    const at::Device device = stage_.weights().all().front().parameter.value.device();
    const auto sent = [&](const Tensor& x) { return x.defined() ? device::send(x, device) : x; };
    MicroBatch loaded{{sent(batch.tokens_BS), sent(batch.labels_BS), batch.starts_BS, sent(batch.learn_BS)},
                      stage_.positions(batch.tokens_BS.size(0), batch.tokens_BS.size(1), batch.starts_BS),
                      stage_.weights().layout().virtual_stages};
    found = loaded_.emplace(first_sample, std::move(loaded)).first;
  }
  if (--found->second.chunks_left == 0) return std::move(loaded_.extract(found).mapped());
  return found->second;
}

StepReport read(const PendingReport& pending) {
  const Tensor numbers = pending.numbers.wait();
  const double* n = numbers.const_data_ptr<double>();
  StepReport report;
  report.step = pending.step;
  report.position = pending.position;
  report.lr = pending.lr;
  report.learned = pending.learned;
  report.loss = pending.learned == 0 ? std::numeric_limits<double>::quiet_NaN() : n[kLoss];
  report.gradient_norm = std::sqrt(n[kSquaredNorm]);
  report.aux_loss = n[kAux];
  report.z_loss = n[kZ];
  report.router_entropy = n[kEntropy];
  const double* const own = n + numbers.numel() - pending.ranks;
  report.router_entropy_of_layer.assign(n + kEntropies, own);
  if (pending.ranks > 1) report.own_seconds.assign(own, own + pending.ranks);
  report.spike = pending.spike.defined() && *pending.spike.wait().const_data_ptr<bool>();
  report.skipped = report.spike || !std::isfinite(report.gradient_norm);
  report.stop_requested = n[kStop] > 0;
  report.saver_writes = n[kWrites] > 0;
  report.saver_failed = n[kFailed] > 0;
  report.save_requested = n[kSave] > 0;
  if (pending.count_LX.defined()) static_cast<ExpertLoad&>(report) = read_load(pending.count_LX.wait());
  return report;
}

}  // namespace upcycle
