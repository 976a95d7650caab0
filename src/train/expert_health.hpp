#pragma once
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "model/weights.hpp"
#include "parallel/mesh.hpp"
#include "upcycle/grow.hpp"

namespace upcycle {

/// How alike the experts of one layer are, and how far they have come. An expert is the vector of all its numbers (gate, up and down).
/// NaN: there are no such pairs, or it is not known.
struct LayerHealth {
  int64_t layer = 0;
  double cosine = kUnknown;           ///< mean over all pairs of experts
  double cosine_between = kUnknown;   ///< mean over the pairs of the same shard (or the same expert of a source) of different copies
  double cosine_inside = kUnknown;    ///< mean over the pairs of different shards of one copy
  std::vector<double> distance;       ///< of each expert: ||expert - d|| / ||d||, d its dense slice times the recipe's factor in the run's
                                      ///< precision; empty: not known
  static constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
};

struct ExpertHealth {
  std::vector<LayerHealth> layers;   ///< those with experts
  std::string trouble;               ///< why there are no distances, where a source was to be read; "" where it was
};

/// **Collective** over the world. Of the values that the model computes with, of every layer with experts, the same on all ranks and,
/// to rounding, on any layout. `recipe`: says what is a copy and where each expert came from; null: unknown. `read`: reads the dense
/// model, or the models or the mixture that it grew out of; null: no distances. Where it throws on some rank, nobody gets distances. No rank sees another's expert: unit vectors are
/// summed over groups of experts, piece by piece (|sum u|^2 = n + n (n - 1) mean cosine). Takes some 100 MB on the way, and reads
/// the dense slice of each expert once. `alive` is called after each weight.
ExpertHealth look_at_experts(const Weights&, const Mesh&, const Recipe* recipe, const ReadDense* read,
                             const std::function<void()>& alive = [] {});

/// Elements that are looked at in one piece: of an expert, or of the sums of all groups together. Lowered by tests.
inline int64_t health_piece_elements = int64_t{1} << 22;

}  // namespace upcycle
