#pragma once
#include "model/catalogue.hpp"
#include "upcycle/read_dense.hpp"
#include "upcycle/recipe.hpp"

namespace upcycle {

/// The way back: `box` of dense tensor `spec` (of catalogue(recipe.source)) of the mixture that `read` reads. A feed-forward that
/// became experts is the mean over its copies of each shard divided by the recipe's factor, every hidden unit where it was before it
/// was cut; all else is the mixture's own tensor, and routers are left out. Merging what was just grown gives the dense tensor: bit for
/// bit where the recipe is lossless, to rounding where it has other factors; after training, or with noise or drop, it is a mean.
/// New CPU tensor: fp32 of a feed-forward, else what `read` gives. Reads what the box needs, or, where hidden units were reordered and
/// the box has some of gate's or up's rows only, 4 MiB of an expert at a time to pick from. Memory: the box in fp64, and as much of
/// an expert.
Tensor merged(const ParameterSpec& spec, const Box& box, const Recipe& recipe, const ReadDense& read);

}  // namespace upcycle
