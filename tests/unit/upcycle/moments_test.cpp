// Moments of Adam, carried over from a dense model. N experts, K of them for a token, G shards
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "unit/upcycle/model.hpp"

namespace upcycle {
namespace {

using namespace testing_model;

Tensor moment(const ParameterSpec& spec, const Box& box, const Recipe& recipe, Moments how, bool second, Dense& dense) {
  Tensor out = at::full(box.size, -7.0, at::kFloat);
  grow_moment(spec, box, recipe, how, second, dense.reader(), out);
  return out;
}

TEST(Moments, AreThoseOfTheDenseSlice) {
  Dense dense(dense_architecture(at::kFloat));   // its numbers stand for moments
  for (const auto order : {UnitOrder::identity, UnitOrder::random, UnitOrder::clusters}) {
    RunConfig config = run(16, 8, 8);
    config.upcycle.permutation = order;
    const Recipe plain = recipe_of(config, dense);
    config.upcycle.noise = 0.3, config.upcycle.drop = 0.5;
    const Recipe recipe = recipe_of(config, dense);
    for (const ParameterSpec& spec : catalogue(recipe.moe)) {
      const Box box = whole(spec.shape);
      if (spec.role == Role::router) {
        EXPECT_TRUE(at::equal(moment(spec, box, recipe, Moments::scaled, true, dense), at::zeros(spec.shape, at::kFloat)));
        continue;
      }
      // Gate x 1, up x 2, down x 4; each expert has half of the tokens. All powers of two.
      const double factor = spec.role != Role::expert ? 0 : spec.name.find("down") != std::string::npos ? 4 : spec.name.find("up") != std::string::npos ? 2 : 1;
      const Tensor slice = factor == 0 ? grown(spec, plain, dense) : grown(spec, plain, dense) / factor;
      for (const bool second : {false, true}) {
        EXPECT_TRUE(at::equal(moment(spec, box, recipe, Moments::copy, second, dense), slice)) << spec.name;
        const double scale = factor == 0 ? 1 : 0.5 / (second ? factor * factor : factor);
        EXPECT_TRUE(at::equal(moment(spec, box, recipe, Moments::scaled, second, dense), slice * scale)) << spec.name;
      }
    }
  }
}

TEST(Moments, OfAnyBox) {
  Dense dense(dense_architecture(at::kFloat));
  RunConfig config = run(8, 4, 4);
  config.upcycle.permutation = UnitOrder::random;
  const Recipe recipe = recipe_of(config, dense);
  for (const ParameterSpec& spec : catalogue(recipe.moe)) {
    Box box = whole(spec.shape);
    for (size_t d = 0; d < box.size.size(); ++d) box.begin[d] = 1, box.size[d] -= 2;
    const Tensor all = moment(spec, whole(spec.shape), recipe, Moments::scaled, true, dense);
    EXPECT_TRUE(at::equal(moment(spec, box, recipe, Moments::scaled, true, dense), slice(all, box))) << spec.name;
  }
}

}  // namespace
}  // namespace upcycle
