#include "train/balance.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "parallel/zigzag.hpp"

namespace upcycle {
namespace {

template <class T>
std::vector<T> values(const Tensor& x) {
  const Tensor host = x.cpu();
  return {host.const_data_ptr<T>(), host.const_data_ptr<T>() + host.numel()};
}

at::Device device_of(Stage& stage) { return stage.weights().all().front().parameter.value.device(); }

}  // namespace

ExpertLoad read_load(const Tensor& count_LX) {
  ExpertLoad load;
  const int64_t layers = count_LX.size(0), experts = count_LX.size(1) - 1;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t* first = count_LX[layer].const_data_ptr<int64_t>();
    const std::vector<int64_t>& row = load.tokens_per_expert.emplace_back(first, first + experts);
    double sum = 0.0;
    for (const int64_t count : row) sum += static_cast<double>(count);
    const double fullest = static_cast<double>(*std::max_element(row.begin(), row.end()));
    load.load_max_over_mean += fullest * static_cast<double>(experts) / sum / static_cast<double>(layers);
    load.dead_experts += std::count(row.begin(), row.end(), 0);
    load.dropped += first[experts];
  }
  return load;
}

Balance::Balance(const RunConfig& config, const Mesh& mesh, Stage& stage) : config_(config), mesh_(mesh), stage_(stage) {
  for (int64_t layer = 0; layer < stage.architecture().layers; ++layer) {
    if (stage.architecture().is_moe_layer(layer)) layers_.push_back(layer);
  }
}

int64_t Balance::row_of(const Router& router) const {
  return std::find(layers_.begin(), layers_.end(), router.layer()) - layers_.begin();
}

// One number for each row of this rank: that of its sequence plus that of its position in it. Rows are [B, S_c] of a context rank,
// flattened; a tensor rank has one of equal slices.
Tensor Balance::token_rows(const Tensor& of_sequence_B, const Tensor& of_position_S) const {
  const int64_t context = mesh_.grid().size(Axis::context), here = mesh_.here()[Axis::context];
  const Tensor own_S = take_zigzag(of_position_S.unsqueeze(0), context, here).squeeze(0);
  const Tensor rows = (of_sequence_B.unsqueeze(1) + own_S).reshape({-1});
  return rows.chunk(mesh_.grid().size(Axis::tensor))[static_cast<size_t>(mesh_.here()[Axis::tensor])];
}

RouterContext Balance::context(int64_t first_sample) const {
  RouterContext context;
  if (layers_.empty()) return context;
  const BalanceSection& balance = config_.balance;
  const double micro_batches = static_cast<double>(config_.train.global_batch / config_.train.micro_batch);   // over all ranks
  const int64_t sequences = config_.train.micro_batch, length = config_.train.sequence;
  const auto int64 = at::TensorOptions(at::kLong).device(device_of(stage_));
  context.balance = {.aux = balance.aux / micro_batches, .z = balance.z / micro_batches, .scope = balance.scope, .sequences = sequences, .sequence_T = {}};
  if (balance.scope == BalanceScope::sequence) {
    context.balance.sequence_T = token_rows(at::arange(sequences, int64), at::zeros({length}, int64));
  }
  if (balance.jitter > 0 || balance.capacity_factor > 0) {
    const Tensor first_B = at::arange(first_sample, first_sample + sequences, int64) * length;
    context.jitter = {balance.jitter, static_cast<uint64_t>(config_.run.seed)};
    context.token_T = token_rows(first_B, at::arange(length, int64));
  }
  return context;
}

Tensor Balance::measures() const {
  constexpr int64_t kEntropy = 2;
  const auto layers = static_cast<int64_t>(layers_.size());
  Tensor all = at::zeros({kMeasures + layers}, at::TensorOptions(at::kDouble).device(device_of(stage_)));
  Tensor sum = all.narrow(0, 0, kMeasures), entropy_L = all.narrow(0, kMeasures, layers);
  for (Router* router : stage_.routers()) {
    const Tensor& own_3 = router->statistics().measures_3;
    sum.add_(own_3);
    entropy_L[row_of(*router)].copy_(own_3[kEntropy]);
  }
  const int64_t micro_batches = config_.train.global_batch / config_.train.micro_batch;
  sum.div_(static_cast<double>(std::max<int64_t>(1, layers) * micro_batches));
  entropy_L.div_(static_cast<double>(micro_batches));
  return all;
}

Tensor Balance::counts() {
  if (layers_.empty()) return {};
  const int64_t experts = stage_.architecture().experts;
  Tensor count_LX = at::zeros({static_cast<int64_t>(layers_.size()), experts + 1}, at::TensorOptions(at::kLong).device(device_of(stage_)));
  for (Router* router : stage_.routers()) {
    const Tensor row = count_LX[row_of(*router)];
    row.narrow(0, 0, experts).copy_(router->statistics().count_E);
    row[experts].copy_(router->statistics().dropped);
    router->reset_statistics();
  }
  mesh_.world().all_reduce(count_LX);   // other stages have zeros in this stage's rows
  return count_LX;
}

void Balance::update(const Tensor& count_LX, const Tensor& applied) {
  const Unrecorded guard;
  const double rate = config_.balance.bias_rate;
  for (Router* router : stage_.routers()) {
    const Tensor count_E = count_LX[row_of(*router)].narrow(0, 0, stage_.architecture().experts);
    RouterState& state = router->state();
    if (rate > 0) {
      const Tensor bias_E = state.bias_E.defined() ? state.bias_E : at::zeros_like(count_E, at::kFloat);
      state.bias_E = moved_bias(bias_E, count_E, rate, applied);
    }
    if (config_.balance.scope == BalanceScope::global) {
      // Before the first step that counts, all experts are as good as balanced.
      const Tensor before_E = state.count_E.defined() ? state.count_E : at::ones_like(count_E);
      state.count_E = at::where(applied, count_E, before_E);
    }
  }
}

nlohmann::json Balance::state() const {
  nlohmann::json own = nlohmann::json::object();
  for (Router* router : stage_.routers()) {
    const RouterState& state = router->state();
    const std::string layer = std::to_string(router->layer());
    if (state.bias_E.defined()) own[layer]["bias"] = values<float>(state.bias_E);
    if (state.count_E.defined()) own[layer]["count"] = values<int64_t>(state.count_E);
  }
  nlohmann::json all = nlohmann::json::object();
  for (const std::string& stage : mesh_.along(Axis::pipeline).all_gather(own.dump())) all.update(nlohmann::json::parse(stage));
  return all;
}

void Balance::restore(const nlohmann::json& state) {
  for (Router* router : stage_.routers()) router->state() = {};
  if (state.empty()) return;
  const auto experts = static_cast<size_t>(stage_.architecture().experts);
  for (Router* router : stage_.routers()) {
    const auto entry = state.find(std::to_string(router->layer()));
    if (entry == state.end()) continue;
    for (const auto& [name, numbers] : entry->items()) {
      if (numbers.size() == experts) continue;
      fail("the checkpoint's router of layer ", router->layer(), " has ", numbers.size(), " numbers in '", name, "', but the model has ",
           experts, " experts: the manifest is damaged");
    }
    const auto put = [&](auto numbers) { return at::tensor(numbers).to(device_of(stage_)); };
    if (entry->contains("bias")) router->state().bias_E = put(entry->at("bias").get<std::vector<float>>());
    if (entry->contains("count")) router->state().count_E = put(entry->at("count").get<std::vector<int64_t>>());
  }
}

int64_t biased_layer(const nlohmann::json& training) {
  const nlohmann::json routers = training.value("routers", nlohmann::json::object());
  for (const auto& [layer, state] : routers.items()) {
    for (const double bias : state.value("bias", std::vector<double>{})) {
      if (bias != 0) return std::stoll(layer);
    }
  }
  return -1;
}

}  // namespace upcycle
