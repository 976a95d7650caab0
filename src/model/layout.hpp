#pragma once
#include <cstdint>
#include <vector>

#include "config/architecture.hpp"
#include "parallel/grid.hpp"

namespace upcycle {

/// The grid, and where in the pipeline each layer is. The layers are cut into stages x virtual_stages chunks, numbered in the order
/// in which a token meets them; chunk c is on stage c % stages, so with virtual stages a token goes round the pipeline several times.
struct Layout {
  Grid grid;
  std::vector<int> chunk_of_layer;   ///< [layers], ascending
  int virtual_stages = 1;            ///< chunks on each stage
  bool tied = false;                 ///< the embedding is needed on the last stage too

  int stages() const noexcept { return grid.size(Axis::pipeline); }
  int chunks() const noexcept { return stages() * virtual_stages; }
  int stage_of(int64_t layer) const { return chunk_of_layer.at(static_cast<size_t>(layer)) % stages(); }

  /// What make_layout gives where [parallel] asks for nothing but the grid.
  static Layout even(const Grid&, const Architecture&);
};

/// Layers as parallel.layout says; else spread evenly, earlier chunks taking one more where it does not divide. The embedding and
/// the head with the loss count as a layer of the first and of the last chunk where the run asks for it.
/// Throws UserError naming the numbers when a chunk would have no layer, or `layout` is not of this model.
Layout make_layout(const Architecture&, const Grid&, const ParallelSection&);

}  // namespace upcycle
