#pragma once
#include <functional>

#include "model/weights.hpp"
#include "parallel/communicator.hpp"
#include "upcycle/grow.hpp"

namespace upcycle {

/// How a run's weights come about at step 0. Each rank fills its own boxes, one parameter at a time: no rank ever holds the dense
/// model, and the bytes are the same on any number of ranks.

/// Fills `target` (CPU, fp32, box.size) with `box` of parameter `spec`.
using Fill = std::function<void(const ParameterSpec& spec, const Box& box, Tensor target)>;

/// Calls `fill` for every part of every master of this rank, then publishes masters into values; of weights allocated for inference, for
/// every value. `alive` is called after each weight: a large model takes longer than a watchdog waits.
void fill_masters(Weights&, const Fill& fill, const std::function<void()>& alive = [] {});

/// **Collective** over `world`. Fills recipe.clusters where the recipe asks for them: of each mixture layer, found by one rank and told to
/// all. `alive` is called after each layer.
void find_clusters(Recipe&, const ReadDense& read, const Communicator& world, const std::function<void()>& alive);

/// The three ways: grown out of a dense model, taken as they are, random.
Fill grown(const Recipe&, const ReadDense& read);
Fill as_they_are(const ReadDense& read);
Fill random(const Architecture&, uint64_t seed);

}  // namespace upcycle
