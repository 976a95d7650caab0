#pragma once
#include <filesystem>
#include <optional>

#include "checkpoint/manifest.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// How the mixture in a checkpoint came out of a dense model, as its provenance tells; nothing for a dense model, and for a mixture
/// that did not (a random start, a directory of others). Reads no tensors. Throws UserError for a recipe that is not whole.
std::optional<Recipe> recipe_of(const std::filesystem::path& checkpoint, const Manifest&);

}  // namespace upcycle
