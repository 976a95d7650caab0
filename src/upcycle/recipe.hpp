#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "config/architecture.hpp"
#include "config/run_config.hpp"

namespace upcycle {

/// How far step 0 may be from the dense function.
enum class Exactness { exact, approximate, destructive };
const char* name(Exactness) noexcept;

/// A checked description of how a dense model becomes a MoE: C copies x G shards = N experts, copy-major (expert c*G + g is
/// shard g of copy c).
struct Recipe {
  Architecture dense;
  Architecture moe;
  int64_t copies = 0;        ///< C
  int64_t granularity = 1;   ///< G
  Scaling scaling = Scaling::exact;
  double gate_factor = 1.0, up_factor = 1.0, down_factor = 1.0;
  double router_logit_std = 1.4;
  double noise = 0.0;
  double drop = 0.0;
  DropIndices drop_indices = DropIndices::shared;
  uint64_t seed = 0;

  Exactness exactness() const;
  /// Every expert value is a dense value times a power of two: nothing is lost in any float format of the source's width.
  bool lossless() const;
};

/// Throws UserError naming the numbers: K % G != 0, f % G != 0, N % G != 0, K > N, pre-softmax in exact mode, a layer policy that
/// HF's config can't say, more than moe.max_parameters parameters.
Recipe make_recipe(const Architecture& dense, const RunConfig&);

/// The architecture that [moe] makes of `dense`; the checks of make_recipe apply.
Architecture moe_architecture(const Architecture& dense, const MoeSection&);

nlohmann::json to_json(const Recipe&);

}  // namespace upcycle
