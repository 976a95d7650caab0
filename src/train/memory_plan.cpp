// Per token of one layer: h hidden, q heads * head_dim, kv kv_heads * head_dim, f feed-forward width, K experts of
// width fe.
#include "train/memory_plan.hpp"

#include <algorithm>
#include <set>

#include "base/box.hpp"
#include "model/holders.hpp"

namespace upcycle {
namespace {

/// Numbers that backward keeps of one layer, per token: what the operations of model/ and moe/ record.
int64_t kept_by_layer(const Architecture& a, int64_t layer, Recompute recompute) {
  const int64_t h = a.hidden, q = a.heads * a.head_dim, kv = a.kv_heads * a.head_dim;
  if (recompute == Recompute::full) return h;
  const bool whole = recompute == Recompute::none;  // selective: norms and activations are cheap to do again
  const int64_t residual = whole ? 4 * h : 2 * h;   // the two inputs, and their norms' outputs
  const int64_t attention = whole ? 3 * q + 3 * kv : 2 * q + 2 * kv;  // product, rotated q and k, v, output
  if (!a.is_moe_layer(layer)) return residual + attention + (whole ? 3 : 2) * a.ffn;
  return residual + attention +
         a.top_k * (2 * h + (whole ? 3 : 2) * a.expert_ffn);  // rows in, gate and up, product, rows out
}

int64_t activation_bytes(const Architecture& a, const RunConfig& run, const Layout& layout, int stage) {
  const int64_t width = run.train.precision == Precision::bf16 ? 2 : 4;
  const int64_t cut = layout.grid.size(Axis::tensor) * layout.grid.size(Axis::context);
  const int64_t tokens = run.train.micro_batch * run.train.sequence / cut;
  const int64_t stages = layout.grid.size(Axis::pipeline);
  const int64_t micro_batches =
      std::max<int64_t>(1, run.train.global_batch / (run.train.micro_batch * layout.grid.size(Axis::data)));
  const int64_t in_flight = std::min(stages - stage, micro_batches);  // one forward, one backward

  int64_t kept = 0, largest = 0;
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    if (layout.stage_of_layer[static_cast<size_t>(layer)] != stage) continue;
    kept += kept_by_layer(a, layer, run.train.recompute);
    if (run.train.recompute == Recompute::full) largest = std::max(largest, kept_by_layer(a, layer, Recompute::none));
  }
  int64_t bytes = tokens * width * (kept * in_flight + largest);
  if (stage == stages - 1)
    bytes += tokens * a.vocab * (2 * width + 8);  // logits, their gradient, and two fp32 copies on the way
  return bytes;
}

}  // namespace

RankMemory rank_memory(const Architecture& a, const RunConfig& run, const Layout& layout, int rank) {
  const Coordinates here = layout.grid.at(rank);
  RankMemory memory{.stage = here[Axis::pipeline], .rank = rank};
  for (const ParameterSpec& spec : catalogue(a)) {
    const auto box = local_box(spec, layout, here);
    if (!box) continue;
    const int64_t count = elements(*box);
    const bool rounds = run.train.precision == Precision::bf16 && !spec.always_fp32();
    const int64_t holders = run.parallel.zero > 0 ? num_holders(spec, layout) : 1;
    const int64_t owned = (count + holders - 1) / holders;
    memory.parameters += count;
    memory.weights += count * (rounds ? 2 : 4);
    memory.masters += rounds ? owned * 4 : 0;
    memory.gradients += count * 4;
    memory.moments += owned * 8;
  }
  memory.activations = activation_bytes(a, run, layout, memory.stage);
  return memory;
}

std::vector<RankMemory> plan_memory(const Architecture& a, const RunConfig& run, const Layout& layout) {
  const Grid& grid = layout.grid;
  std::vector<RankMemory> stages(static_cast<size_t>(grid.size(Axis::pipeline)));
  std::set<std::array<int, 4>> seen;  // ranks that differ along other axes hold the same
  for (int rank = 0; rank < grid.world(); ++rank) {
    const Coordinates at = grid.at(rank);
    if (!seen.insert({at[Axis::tensor], at[Axis::expert_tensor], at[Axis::expert], at[Axis::pipeline]}).second)
      continue;
    const RankMemory memory = rank_memory(a, run, layout, rank);
    RankMemory& largest = stages[static_cast<size_t>(memory.stage)];
    if (memory.parameters > largest.parameters) largest = memory;
  }
  return stages;
}

}  // namespace upcycle
