#pragma once
// A small dense model with random weights and the catalogue of what it grows into, for the tests of this folder.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <map>

#include "base/rng.hpp"
#include "upcycle/grow.hpp"
#include "upcycle/units.hpp"

namespace upcycle::testing_model {

inline Architecture dense_architecture(at::ScalarType dtype = at::kBFloat16) {
  Architecture a;
  a.hidden = 12, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 6, a.ffn = 32, a.vocab = 29, a.tied = true, a.dtype = dtype;
  return a;
}

/// Every dense tensor in memory, in the architecture's dtype; `reads` tells which boxes were asked for.
struct Dense {
  explicit Dense(const Architecture& a) : specs(catalogue(a)) {
    for (const ParameterSpec& spec : specs) {
      Tensor value = at::empty(spec.shape, at::kFloat);
      const Random random(7, spec.name);
      float* const data = value.data_ptr<float>();
      for (int64_t i = 0; i < value.numel(); ++i) data[i] = static_cast<float>(0.1 + 0.5 * random.normal(static_cast<uint64_t>(i)));
      tensors[spec.name] = value.to(a.dtype);
    }
  }
  ReadDense reader() {
    return [this](const std::string& name, const Box& box) {
      reads.emplace_back(name, box);
      Tensor out = tensors.at(name);
      for (size_t d = 0; d < box.size.size(); ++d) out = out.narrow(static_cast<int64_t>(d), box.begin[d], box.size[d]);
      return out.contiguous();
    };
  }
  std::vector<ParameterSpec> specs;
  std::map<std::string, Tensor> tensors;
  std::vector<std::pair<std::string, Box>> reads;
};

inline RunConfig run(int64_t experts, int64_t granularity, int64_t top_k) {
  RunConfig config;
  config.moe_given = true;
  config.moe.experts = experts, config.moe.granularity = granularity, config.moe.top_k = top_k;
  return config;
}

/// make_recipe, and what a run finds out before it grows.
inline Recipe recipe_of(const RunConfig& config, Dense& dense, const Architecture& architecture = dense_architecture()) {
  Recipe recipe = make_recipe(architecture, config);
  for (int64_t layer = 0; recipe.permutation == UnitOrder::clusters && layer < recipe.moe.layers; ++layer) {
    if (recipe.moe.is_moe_layer(layer)) recipe.clusters[layer] = cluster_units(recipe, layer, dense.reader());
  }
  return recipe;
}

inline Tensor grown(const ParameterSpec& spec, const Box& box, const Recipe& recipe, Dense& dense) {
  Tensor out = at::zeros(box.size, at::kFloat);
  grow(spec, box, recipe, dense.reader(), out);
  return out;
}
inline Tensor grown(const ParameterSpec& spec, const Recipe& recipe, Dense& dense) { return grown(spec, whole(spec.shape), recipe, dense); }

inline Tensor slice(Tensor x, const Box& box) {
  for (size_t d = 0; d < box.size.size(); ++d) x = x.narrow(static_cast<int64_t>(d), box.begin[d], box.size[d]);
  return x;
}

}  // namespace upcycle::testing_model
