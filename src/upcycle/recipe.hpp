#pragma once
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "config/architecture.hpp"
#include "config/run_config.hpp"

namespace upcycle {

/// How far step 0 may be from the dense function.
enum class Exactness { exact, approximate, destructive };
const char* name(Exactness) noexcept;

/// A checked description of how a model becomes a (larger) MoE. A dense one: C copies x G shards = N experts, copy-major (expert
/// c*G + g is shard g of copy c). A mixture of n experts: C copies of each, side by side (experts e*C .. e*C + C-1 are the source's e),
/// so that equal router rows are neighbours and any tie takes all copies of an expert before the next one's; G = 1.
struct Recipe {
  Architecture source;       ///< what it grows out of
  Architecture moe;
  int64_t copies = 0;        ///< C
  int64_t granularity = 1;   ///< G
  Scaling scaling = Scaling::exact;
  double gate_factor = 1.0, up_factor = 1.0, down_factor = 1.0;
  std::vector<int64_t> quotas = {};   ///< of several sources, how many copies are each one's, in order; empty: one source
  bool sources_alike = true;          ///< several sources are the same bytes
  UnitOrder permutation = UnitOrder::identity;
  std::map<int64_t, std::vector<int64_t>> clusters = {};   ///< by layer, see cluster_units; filled once the dense model can be read
  double router_logit_std = 1.4;
  double noise = 0.0;
  double drop = 0.0;
  DropIndices drop_indices = DropIndices::shared;
  uint64_t seed = 0;

  bool of_mixture() const { return source.is_moe(); }
  /// So many neighbouring experts have one router row: the shards of a copy, or the copies of a source's expert.
  int64_t tied() const { return of_mixture() ? copies : granularity; }
  /// Which source a copy is of.
  int64_t source_of(int64_t copy) const;
  /// Several sources that differ are approximate: each token meets some of them, and the function to compare with is the mean model's.
  Exactness exactness() const;
  /// Every expert value is a dense value times a power of two: nothing is lost in any float format of the source's width.
  bool lossless() const;
};

/// `source` is dense, or a mixture of fewer experts than [moe] asks for.
/// Throws UserError naming the numbers: K % G != 0, f % G != 0, N % G != 0, K > N, pre-softmax in exact mode, a layer policy that
/// HF's config can't say, more than moe.max_parameters parameters; of a mixture experts that are no multiple of its own, a granularity, and,
/// in exact mode, any other top_k than C times its own; of several sources, quotas that are not C in sum. Whether the sources are alike it
/// takes from their names: who can read them knows better.
Recipe make_recipe(const Architecture& source, const RunConfig&);

/// The architecture that [moe] makes of `source`; the checks of make_recipe apply.
Architecture moe_architecture(const Architecture& source, const MoeSection&);

/// Clusters are left out: they are as many numbers as the model has hidden units, and travel in a file of their own.
nlohmann::json to_json(const Recipe&);
/// The content of kClustersFile: {"layer": [units], ...}.
inline constexpr const char* kClustersFile = "clusters.json";
std::string clusters_to_text(const Recipe&);
/// What to_json wrote, of a mixture of this architecture. `clusters`: the content of kClustersFile, "" where there is none.
/// Throws UserError naming what is missing or contradicts the architecture.
Recipe recipe_from_json(const nlohmann::json&, const Architecture& moe, const std::string& clusters);

/// The dense model of the same widths: `moe` without its experts.
Architecture dense_form(const Architecture& moe);

}  // namespace upcycle
