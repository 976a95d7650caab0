#pragma once
#include "model/catalogue.hpp"
#include "upcycle/read_dense.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// The way back: dense tensor `spec` (of catalogue(recipe.source)) of the mixture that `read` reads, whole. A feed-forward that
/// became experts is the mean over its copies of each shard divided by the recipe's factor, every hidden unit where it was before it
/// was cut; all else is the mixture's own tensor, and routers are left out. Merging what was just grown gives the dense tensor: bit for
/// bit where the recipe is lossless, to rounding where it has other factors; after training, or with noise or drop, it is a mean.
/// New CPU tensor: fp32 of a feed-forward, else what `read` gives. Memory: one dense matrix in fp64 and one expert.
Tensor merged(const ParameterSpec& spec, const Recipe& recipe, const ReadDense& read);

}  // namespace upcycle
