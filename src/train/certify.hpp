#pragma once
#include "config/run_config.hpp"
#include "data/sampler.hpp"
#include "model/stage.hpp"
#include "upcycle/certificate.hpp"
#include "upcycle/grow.hpp"

namespace upcycle {

/// **Collective** over the world. Holds the freshly grown model of `stage` against its source:
/// weight level, every value that this rank holds; function level, source and mixture on the same tokens, in fp32 (the masters) and
/// in the run's precision. One feed-forward of the source (of a mixture, one expert) at a time is read; no second model comes about. The verdict, by the recipe's class,
/// is the same on all ranks. `alive` is called after each weight and layer.
Certificate certify(Stage& stage, const Mesh& mesh, const Recipe& recipe, const ReadDense& read, const Sampler& tokens,
                    const RunConfig& config, const std::function<void()>& alive);

}  // namespace upcycle
