#include "train/traffic_plan.hpp"

#include <algorithm>

#include "model/holders.hpp"
#include "moe/dispatcher.hpp"
#include "train/saved.hpp"

namespace upcycle {
namespace {

struct LayersOfStage {
  double all = 0, moe = 0;
};

LayersOfStage layers_of(const Architecture& a, const Layout& layout, int stage) {
  LayersOfStage layers;
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    if (layout.stage_of(layer) != stage) continue;
    layers.all += 1;
    layers.moe += a.is_moe_layer(layer);
  }
  return layers;
}

/// One row for every kind of message, the same kinds in the same order for all stages.
using TrafficRows = std::vector<Traffic>;

void add(TrafficRows& rows, Axis axis, const char* what, double forward, double backward) {
  rows.push_back({axis, what, static_cast<int64_t>(forward), static_cast<int64_t>(backward)});
}

/// `x`: bytes of this rank's token rows, of all MoE layers and micro-batches.
void add_experts(TrafficRows& rows, const Architecture& a, const RunConfig& run, const Grid& grid, double x, int64_t width, double again) {
  using enum Axis;
  const double ranks = grid.size(expert), peers = grid.size(expert_tensor);
  if (a.is_moe() && chosen_dispatch(run.moe.dispatcher, a.top_k, grid.size(expert), grid.size(expert_tensor)) == Dispatch::all_gather) {
    const double others = ranks * peers - 1, sums = x * 4 / static_cast<double>(width);   // partial sums travel in fp32
    add(rows, expert, "all tokens to all ranks", x * others, x * others * (1 + again));
    add(rows, expert, "sums of the experts' answers back", sums * others, sums * others * (1 + again));
    return;
  }
  // Padded, every expert is sent its capacity, whatever was chosen.
  const bool padded = run.balance.pad_to_capacity && run.balance.capacity_factor > 0;
  const double sent = x * static_cast<double>(a.top_k) * (padded ? run.balance.capacity_factor : 1.0);
  const double away = sent * (ranks - 1) / ranks;
  add(rows, expert, "tokens to their experts", away, away * (1 + again));
  add(rows, expert, "experts' answers back", away, away * (1 + again));
  add(rows, expert_tensor, "rows of the experts' slices, and the sums of their answers", 2 * sent * (peers - 1),
      2 * sent * (peers - 1) * (1 + again));
}

void add_activations(TrafficRows& rows, const Architecture& a, const RunConfig& run, const Layout& layout, int stage) {
  using enum Axis;
  const Grid& grid = layout.grid;
  const MicroBatch batch(a, run, grid);
  const LayersOfStage layers = layers_of(a, layout, stage);
  const auto others = [&](Axis axis) { return static_cast<double>(grid.size(axis) - 1); };
  const double m = static_cast<double>(micro_batches_of_rank(run, grid));
  const double again = run.train.recompute == Recompute::full ? 1 : 0;   // forward's messages travel once more, in backward
  const int last = grid.size(pipeline) - 1;

  // An all-gather before and a reduce-scatter after attention and dense feed-forwards; one of them at the model's ends.
  const double x = m * static_cast<double>(batch.own * a.hidden * batch.width);   // what a rank holds between layers
  const double regions = 2 * (layers.all + layers.all - layers.moe), ends = (stage == 0) + (stage == last);
  add(rows, tensor, "activations, around attention, feed-forwards and the ends", x * others(tensor) * (regions + ends),
      x * others(tensor) * (regions * (1 + again) + ends));

  const int64_t kv_width = std::max<int64_t>(1, a.kv_heads / grid.size(tensor)) * a.head_dim;
  const double kv = m * static_cast<double>(batch.gathered * 2 * kv_width * batch.width);
  add(rows, context, "keys and values, their gradients back", layers.all * kv * others(context),
      layers.all * kv * others(context) * (1 + again));

  const double chunks = static_cast<double>(run.parallel.virtual_stages);
  add(rows, pipeline, "activations to the next stage, their gradients back", x * (chunks - (stage == last)), x * (chunks - (stage == 0)));

  add_experts(rows, a, run, grid, x * layers.moe, batch.width, again);
}

/// Gradients after backward, and with ZeRO-1 parameters before the next forward, over the ranks that hold the same slices.
void add_parameters(TrafficRows& rows, const Architecture& a, const RunConfig& run, const Layout& layout, int stage) {
  const Grid& grid = layout.grid;
  const Coordinates here = grid.at(grid.world() / grid.size(Axis::pipeline) * stage);
  double forward[2] = {}, backward[2] = {};
  for (const ParameterSpec& spec : catalogue(a)) {
    const auto box = local_box(spec, layout, here);
    if (!box) continue;
    const double n = num_holders(spec, layout);
    const double sent = static_cast<double>(elements(*box)) * (n - 1) / n;
    const bool rounds = run.train.precision == Precision::bf16 && !spec.always_fp32(), divided = run.parallel.zero > 0;
    const bool expert = spec.role == Role::expert;
    backward[expert] += sent * 4 * (divided ? 1 : 2);
    forward[expert] += divided ? sent * (rounds ? 2 : 4) : 0;
  }
  add(rows, Axis::replica, "parameters outside the experts, their gradients", forward[0], backward[0]);
  add(rows, Axis::expert_data, "experts' parameters, their gradients", forward[1], backward[1]);
}

}  // namespace

int64_t micro_batches_of_rank(const RunConfig& run, const Grid& grid) {
  return std::max<int64_t>(1, run.train.global_batch / (run.train.micro_batch * grid.size(Axis::data)));
}

double pipeline_bubble(const RunConfig& run, const Grid& grid) {
  return static_cast<double>(grid.size(Axis::pipeline) - 1) /
         static_cast<double>(run.parallel.virtual_stages * micro_batches_of_rank(run, grid));
}

std::vector<Traffic> plan_traffic(const Architecture& a, const RunConfig& run, const Layout& layout) {
  TrafficRows most;
  for (int stage = 0; stage < layout.grid.size(Axis::pipeline); ++stage) {
    TrafficRows rows;
    add_activations(rows, a, run, layout, stage);
    add_parameters(rows, a, run, layout, stage);
    if (most.empty()) most = rows;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].total() > most[i].total()) most[i] = rows[i];
    }
  }
  std::erase_if(most, [](const Traffic& row) { return row.total() == 0; });
  return most;
}

}  // namespace upcycle
