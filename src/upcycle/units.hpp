#pragma once
#include <vector>

#include "base/rng.hpp"
#include "upcycle/read_dense.hpp"
#include "upcycle/recipe.hpp"

// For recipes of dense sources. The hidden units of a dense feed-forward, as experts take them. A feed-forward is the same function whatever the order of its
// units, so each copy may have an order of its own before it is cut: expert (c, g) has units order(c)[g*f/G .. (g+1)*f/G).
namespace upcycle {

/// 0 .. count-1, sorted by the random number of each.
std::vector<int64_t> shuffled(int64_t count, const Random&);

/// The order in which copy `copy` takes the units of `layer`: as they are, drawn from (seed, layer, copy), or the clusters that
/// the recipe holds. Throws std::logic_error when it holds none of that layer.
std::vector<int64_t> unit_order(const Recipe&, int64_t layer, int64_t copy);

/// The dense units of expert `expert` of `layer`, in its order.
std::vector<int64_t> units_of_expert(const Recipe&, int64_t layer, int64_t expert);

/// Whether all copies take the units in one order, so that shard g is the same in each.
inline bool copies_share_order(const Recipe& recipe) { return recipe.permutation != UnitOrder::random; }

/// Of dense matrix `name`, the rows (unit_dim 0) or columns (1) `units`, in that order, from `begin` to `begin + size` along the
/// other dim. Neighbours are read together; scattered rows one by one; for scattered columns whole rows are, some at a time.
/// The result has the dtype that `read` gives; memory for it and at most 64 MB more.
Tensor read_units(const ReadDense& read, const std::string& name, int64_t unit_dim, const std::vector<int64_t>& units, int64_t begin, int64_t size);

/// An order of the units of `layer` in which each of the G equal parts is a cluster: units whose gate and up rows point into
/// similar directions. Balanced spherical k-means on sketches of the rows; sums in fp64 and in one order, so that every machine and
/// any number of ranks finds the same. Reads gate and up once, 256 rows at a time; keeps f x 512 floats.
std::vector<int64_t> cluster_units(const Recipe&, int64_t layer, const ReadDense&);

}  // namespace upcycle
