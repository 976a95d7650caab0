#include "train/memory_plan.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "base/box.hpp"
#include "model/holders.hpp"
#include "train/saved.hpp"
#include "train/schedule.hpp"
#include "train/traffic_plan.hpp"

namespace upcycle {
namespace {

/// One chunk of layers at work on one micro-batch.
struct ChunkMemory {
  int64_t kept = 0;      ///< from its forward to its backward
  int64_t on_top = 0;    ///< the most beside that, in forward or backward
};

ChunkMemory memory_of_chunk(const Architecture& a, const RunConfig& run, const Layout& layout, int chunk) {
  const Grid& grid = layout.grid;
  const MicroBatch rows(a, run, grid);
  const int64_t row = a.hidden * rows.width;
  const auto on = [&](Axis axis, int64_t bytes) { return grid.size(axis) > 1 ? bytes : 0; };
  ChunkMemory memory;
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    if (layout.chunk_of_layer[static_cast<size_t>(layer)] != chunk) continue;
    const std::vector<Saved> saved = saved_by_layer(a, run, grid, layer);
    const int64_t kept = saved_bytes(saved, run.train.recompute);
    const int64_t again = saved_bytes(saved, Recompute::none) - kept;   // computed anew when this layer's backward begins
    const int64_t messages = on(Axis::tensor, rows.gathered * row) + (a.is_moe_layer(layer) ? on(Axis::expert, rows.routed * row) : 0);
    memory.kept += kept;
    memory.on_top = std::max(memory.on_top, again + passing_in_layer(a, run, grid, layer) + messages);
  }
  if (chunk == layout.chunks() - 1) {
    const int64_t head = saved_bytes(saved_by_head(a, run, grid), run.train.recompute);
    memory.kept += head;
    memory.on_top = std::max(memory.on_top - head, passing_in_head(a, run, grid));   // all of the head's work is in forward, but for its norm
  }
  // The embedding's backward comes when nothing else of this micro-batch is left.
  if (chunk == 0) memory.on_top = std::max(memory.on_top, passing_in_embedding(a, run, grid) - memory.kept);
  memory.on_top += on(Axis::pipeline, 3 * rows.own * row);   // what came, what is made and what goes
  return memory;
}

/// Walks through the stage's plan, as the pipeline will.
void add_activations(RankMemory& memory, const Architecture& a, const RunConfig& run, const Layout& layout) {
  const int stages = layout.stages();
  std::map<int, ChunkMemory> chunks;
  for (int chunk = memory.stage; chunk < layout.chunks(); chunk += stages) chunks[chunk] = memory_of_chunk(a, run, layout, chunk);
  // Some micro-batches per stage fill the pipeline; more of them change nothing.
  const int64_t micro_batches = std::min<int64_t>(micro_batches_of_rank(run, layout.grid), 4 * stages);
  int64_t kept = 0, most = 0, in_flight = 0, most_in_flight = 0;
  for (const Step& step : one_forward_one_backward(memory.stage, stages, layout.virtual_stages, micro_batches)) {
    for (const Action& action : step) {
      const ChunkMemory& chunk = chunks.at(action.chunk);
      if (action.pass == Pass::forward) {
        kept += chunk.kept;
        memory.activations = std::max(memory.activations, kept);
        most_in_flight = std::max(most_in_flight, ++in_flight);
      } else {
        most = std::max(most, kept + chunk.on_top);
        kept -= chunk.kept;
        --in_flight;
      }
    }
  }
  memory.in_flight = static_cast<double>(most_in_flight) / layout.virtual_stages;
  memory.buffers = most - std::min(most, memory.activations);
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
  add_activations(memory, a, run, layout);
  return memory;
}

std::vector<RankMemory> plan_memory(const Architecture& a, const RunConfig& run, const Layout& layout) {
  const Grid& grid = layout.grid;
  std::vector<RankMemory> stages(static_cast<size_t>(grid.size(Axis::pipeline)));
  std::set<std::array<int, 2>> seen;  // ranks that differ along other axes hold as much: only the vocabulary's parts may be unequal
  for (int rank = 0; rank < grid.world(); ++rank) {
    const Coordinates at = grid.at(rank);
    if (!seen.insert({at[Axis::tensor], at[Axis::pipeline]}).second) continue;
    const RankMemory memory = rank_memory(a, run, layout, rank);
    RankMemory& largest = stages[static_cast<size_t>(memory.stage)];
    if (memory.parameters > largest.parameters) largest = memory;
  }
  return stages;
}

const RankMemory& largest(const std::vector<RankMemory>& ranks) {
  return *std::max_element(ranks.begin(), ranks.end(), [](const auto& a, const auto& b) { return a.total() < b.total(); });
}

}  // namespace upcycle
