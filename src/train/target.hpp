#pragma once
#include <optional>

#include "config/run_config.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// What a run trains, and how it comes out of its source.
struct Target {
  Architecture architecture;
  std::optional<Recipe> recipe;   ///< the source has weights and is dense where [moe] asks for experts, or a mixture of fewer
};

/// What `run` makes of a source of this architecture: the same, or, where [moe] asks for experts, its mixture. Pure.
/// `has_weights` is false for a run that starts at random from an architecture file alone.
/// A mixture of as many experts is taken as it is; one of other numbers grows.
/// Throws UserError when [moe] contradicts a source that is a mixture of as many experts or has no weights, for whatever make_recipe
/// refuses, and for a model of more than moe.max_parameters.
Target choose_target(const RunConfig& run, const Architecture& source, bool has_weights);

/// Throws UserError when [moe] contradicts `source`, which is a mixture.
void refuse_contradiction(const MoeSection& moe, const Architecture& source);

}  // namespace upcycle
