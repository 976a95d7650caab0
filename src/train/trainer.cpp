#include "train/trainer.hpp"

#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "base/autograd.hpp"
#include "base/shutdown.hpp"
#include "train/context_batch.hpp"
#include "train/learning_rate.hpp"

namespace upcycle {
namespace {

// PendingReport::numbers, each a plain sum over the world.
enum Numbers { kSquaredNorm, kLoss, kAux, kZ, kStop };

}  // namespace

Trainer::Trainer(const RunConfig& config, const Mesh& mesh, Stage& stage, Optimizer& optimizer, const Sampler& train)
    : config_(config), mesh_(mesh), stage_(stage), optimizer_(optimizer), sampler_(train) {
  const int64_t global_micro_batches = config.train.global_batch / config.train.micro_batch;
  micro_batches_ = global_micro_batches / mesh.grid().size(Axis::data);
  balance_ = {config.balance.aux / static_cast<double>(global_micro_batches),
              config.balance.z / static_cast<double>(global_micro_batches)};
}

PendingReport Trainer::step() {
  optimizer_.zero_gradients();
  const Tensor loss = accumulate_gradients();                              // 1. forward and backward of every micro-batch
  reduce_gradients(stage_.weights(), mesh_);                               // 2. sum each gradient over who holds the same slice

  PendingReport report;
  report.step = ++state_.step;
  report.position = state_.position += config_.train.global_batch;
  std::vector<Tensor> counts;
  Tensor balance_losses = at::zeros({2}, loss.options());
  for (Router* router : stage_.routers()) {
    counts.push_back(router->statistics().count_E);
    balance_losses.add_(router->statistics().losses_2);
    router->reset_statistics();
  }
  const Tensor stop = at::full({}, shutdown::requested() ? 1.0 : 0.0, loss.options());
  Tensor numbers = at::stack({optimizer_.squared_norm_share(), loss, balance_losses[0], balance_losses[1], stop});
  mesh_.world().all_reduce(numbers);                                       // 3. the whole model's norm; the wish to stop rides along
  if (!counts.empty()) {
    Tensor count_LE = at::stack(counts);
    mesh_.along(Axis::replica).all_reduce(count_LE);
    report.count_LE = device::HostCopy(count_LE);
    const double layers = static_cast<double>(counts.size());
    numbers.narrow(0, kAux, 2).div_(layers * static_cast<double>(config_.train.global_batch / config_.train.micro_batch));
  }

  report.numbers = device::HostCopy(numbers);
  report.lr = learning_rate(config_.optimizer, config_.train.steps, report.step);
  optimizer_.step(report.lr, numbers[kSquaredNorm]);                       // 4. clip by that norm, then move
  return report;
}

Tensor Trainer::accumulate_gradients() {
  const double tokens = static_cast<double>(config_.train.global_batch * config_.train.sequence);
  const int64_t data_rank = mesh_.here()[Axis::data], data_size = mesh_.grid().size(Axis::data);
  Tensor total;
  for (int64_t number = 0; number < micro_batches_; ++number) {
    // Micro-batch j of the step is the same sequences on any number of ranks; rank r takes every size-th of them.
    const int64_t j = number * data_size + data_rank;
    const Batch batch = micro_batch(sampler_, state_.position + j * config_.train.micro_batch);
    const Positions positions = stage_.positions(batch.tokens_BS.size(0), batch.tokens_BS.size(1), batch.starts_BS);
    const Tensor hidden = stage_.blocks(stage_.embed(batch.tokens_BS), positions, balance_);
    // Divided by the step's tokens once, here; from now on every reduction is a plain sum.
    const Tensor loss = stage_.token_losses(hidden, batch.labels_BS).sum() / tokens;
    torch::autograd::backward({loss}, {});
    const Tensor detached = loss.detach().to(at::kDouble);
    total = total.defined() ? total + detached : detached;
  }
  return mesh_.here()[Axis::tensor] == 0 ? total : at::zeros_like(total);   // all tensor ranks know it; it counts once
}

double Trainer::validate(const Sampler& sampler, int64_t batches) {
  const Unrecorded guard;
  const int64_t data_rank = mesh_.here()[Axis::data], data_size = mesh_.grid().size(Axis::data);
  const int64_t sequences = batches * config_.train.global_batch;
  Tensor total;
  for (int64_t first = data_rank * config_.train.micro_batch; first < sequences; first += data_size * config_.train.micro_batch) {
    const Batch batch = micro_batch(sampler, first);
    const Positions positions = stage_.positions(batch.tokens_BS.size(0), batch.tokens_BS.size(1), batch.starts_BS);
    const Tensor hidden = stage_.blocks(stage_.embed(batch.tokens_BS), positions, {});
    const Tensor loss = stage_.token_losses(hidden, batch.labels_BS).sum(at::kDouble);
    total = total.defined() ? total + loss : loss;
  }
  total = total.reshape({1});
  mesh_.along(Axis::replica).all_reduce(total);
  return total.item<double>() / static_cast<double>(sequences * config_.train.sequence);
}

Batch Trainer::micro_batch(const Sampler& sampler, int64_t first_sample) const {
  const Batch batch = of_context_rank(sampler.batch(first_sample, config_.train.micro_batch), mesh_.grid().size(Axis::context),
                                      mesh_.here()[Axis::context]);
  const at::Device device = stage_.weights().all().front().parameter.value.device();
  return {device::send(batch.tokens_BS, device), device::send(batch.labels_BS, device), batch.starts_BS};
}

void reduce_gradients(Weights& weights, const Mesh& mesh) {
  for (Weights::GradientBuffer& buffer : weights.gradients()) mesh.along(buffer.axis).all_reduce(buffer.flat);
}

StepReport read(const PendingReport& pending) {
  const Tensor numbers = pending.numbers.wait();
  const double* n = numbers.const_data_ptr<double>();
  StepReport report;
  report.step = pending.step;
  report.position = pending.position;
  report.lr = pending.lr;
  report.loss = n[kLoss];
  report.gradient_norm = std::sqrt(n[kSquaredNorm]);
  report.aux_loss = n[kAux];
  report.z_loss = n[kZ];
  report.skipped = !std::isfinite(report.gradient_norm);
  report.stop_requested = n[kStop] > 0;
  if (!pending.count_LE.defined()) return report;
  const Tensor counts = pending.count_LE.wait();
  for (int64_t layer = 0; layer < counts.size(0); ++layer) {
    const int64_t* first = counts[layer].const_data_ptr<int64_t>();
    const std::vector<int64_t>& row = report.tokens_per_expert.emplace_back(first, first + counts.size(1));
    double sum = 0.0;
    for (const int64_t count : row) sum += static_cast<double>(count);
    const double fullest = static_cast<double>(*std::max_element(row.begin(), row.end()));
    report.load_max_over_mean += fullest * static_cast<double>(row.size()) / sum / static_cast<double>(counts.size(0));
  }
  return report;
}

}  // namespace upcycle
