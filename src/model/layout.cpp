#include "model/layout.hpp"

#include <numeric>

#include "base/error.hpp"

namespace upcycle {
namespace {

// Layers of each chunk, evenly; the ends of the model count as layers where asked.
std::vector<int64_t> spread(const Architecture& a, int64_t chunks, const ParallelSection& parallel) {
  const int64_t embedding = parallel.count_embedding, loss = parallel.count_loss, all = a.layers + embedding + loss;
  std::vector<int64_t> counts;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) counts.push_back(all / chunks + (chunk < all % chunks));
  counts.front() -= embedding;
  counts.back() -= loss;
  for (const int64_t count : counts) {
    if (count >= 1) continue;
    fail("pipeline = ", parallel.pipeline, " x virtual_stages = ", parallel.virtual_stages, " makes ", chunks,
         " chunks for num_hidden_layers = ", a.layers, embedding ? ", the embedding" : "", loss ? ", the loss" : "",
         ": every chunk needs at least one layer", embedding + loss == 0 ? text(", so ", all, " is the most") : "");
  }
  return counts;
}

}  // namespace

Layout Layout::even(const Grid& grid, const Architecture& a) {
  ParallelSection plain;
  plain.pipeline = grid.size(Axis::pipeline);
  return make_layout(a, grid, plain);
}

Layout make_layout(const Architecture& a, const Grid& grid, const ParallelSection& parallel) {
  Layout layout{.grid = grid, .chunk_of_layer = {}, .virtual_stages = static_cast<int>(parallel.virtual_stages), .tied = a.tied};
  const std::vector<int64_t> counts = parallel.layout.empty() ? spread(a, layout.chunks(), parallel) : parallel.layout;
  const int64_t sum = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (static_cast<int>(counts.size()) != layout.chunks() || sum != a.layers) {
    fail("parallel.layout has ", sum, " layers in ", counts.size(), " chunks; the model has ", a.layers, " in ", layout.chunks(),
         " (pipeline ", layout.stages(), " x virtual_stages ", layout.virtual_stages, ")");
  }
  for (size_t chunk = 0; chunk < counts.size(); ++chunk) {
    layout.chunk_of_layer.insert(layout.chunk_of_layer.end(), static_cast<size_t>(counts[chunk]), static_cast<int>(chunk));
  }
  return layout;
}

}  // namespace upcycle
