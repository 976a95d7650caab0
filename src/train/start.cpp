#include "train/start.hpp"

#include <ATen/ops/empty.h>

#include "base/autograd.hpp"
#include "base/log.hpp"

namespace upcycle {

void fill_masters(Weights& weights, const Fill& fill, const std::function<void()>& alive) {
  const Unrecorded guard;
  size_t done = 0;
  for (Weight& weight : weights.all()) {
    for (const Part& part : weight.parts) {
      Tensor master = part.of(weight.parameter.master);
      if (master.is_cuda()) {
        const Tensor host = at::empty(part.box.size, at::kFloat);
        fill(part.spec, part.box, host);
        master.copy_(host);
      } else {
        fill(part.spec, part.box, master);
      }
    }
    ++done;
    alive();
    log::progress("filling weights " + std::to_string(done) + "/" + std::to_string(weights.all().size()));
  }
  weights.publish();
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
