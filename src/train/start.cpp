#include "train/start.hpp"

#include <ATen/ops/empty.h>

#include <nlohmann/json.hpp>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "upcycle/units.hpp"

namespace upcycle {

void fill_masters(Weights& weights, const Fill& fill, const std::function<void()>& alive) {
  const Unrecorded guard;
  size_t done = 0;
  for (Weight& weight : weights.all()) {
    for (const Part& part : weight.parts) {
      const Parameter& parameter = weight.parameter;
      Tensor target = part.of(parameter.master.defined() ? parameter.master : parameter.value);
      if (target.is_cuda() || target.scalar_type() != at::kFloat) {
        const Tensor host = at::empty(part.box.size, at::kFloat);
        fill(part.spec, part.box, host);
        target.copy_(host);
      } else {
        fill(part.spec, part.box, target);
      }
    }
    ++done;
    alive();
    log::progress("filling weights " + std::to_string(done) + "/" + std::to_string(weights.all().size()));
  }
  weights.publish();
}

void find_clusters(Recipe& recipe, const ReadDense& read, const Communicator& world, const std::function<void()>& alive) {
  if (recipe.permutation != UnitOrder::clusters) return;
  std::map<int64_t, std::vector<int64_t>> mine;
  int64_t turn = 0;
  for (int64_t layer = 0; layer < recipe.moe.layers; ++layer) {
    if (!recipe.moe.is_moe_layer(layer) || turn++ % world.size() != world.rank()) continue;
    mine[layer] = cluster_units(recipe, layer, read);
    alive();
    log::progress(text("clusters of hidden units: layer ", layer + 1, "/", recipe.moe.layers));
  }
  for (const std::string& told : world.all_gather(nlohmann::json(mine).dump())) {
    recipe.clusters.merge(nlohmann::json::parse(told).get<std::map<int64_t, std::vector<int64_t>>>());
  }
}

Fill grown(const Recipe& recipe, const ReadDense& read) {
  return [&recipe, read](const ParameterSpec& spec, const Box& box, Tensor target) { grow(spec, box, recipe, read, target); };
}

Fill as_they_are(const ReadDense& read) {
  return [read](const ParameterSpec& spec, const Box& box, Tensor target) { target.copy_(read(spec.name, box)); };
}

Fill random(const Architecture& architecture, uint64_t seed) {
  return [architecture, seed](const ParameterSpec& spec, const Box& box, Tensor target) {
    initialise(spec, box, architecture, seed, target);
  };
}

}  // namespace upcycle
