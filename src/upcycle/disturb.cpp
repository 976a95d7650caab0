// e one of the experts; fe expert width (hidden units of one expert)
#include "upcycle/disturb.hpp"

#include <cmath>

#include "base/error.hpp"
#include "base/rng.hpp"
#include "upcycle/map_elements.hpp"
#include "upcycle/units.hpp"

namespace upcycle {
namespace {

/// For each hidden unit of expert `e`: is it drawn anew? The floor(drop * fe) units with the smallest random numbers are.
std::vector<bool> dropped_units(const ParameterSpec& spec, int64_t e, int64_t fe, const Recipe& recipe) {
  const auto count = static_cast<int64_t>(std::floor(recipe.drop * static_cast<double>(fe) + 1e-9));  // 0.29 * 100 is 28.99...
  const std::string whose = recipe.drop_indices == DropIndices::shared ? text("layer ", spec.layer) : spec.name;
  const Random random(recipe.seed, text(whose, "/dropped units of expert ", e));
  const std::vector<int64_t> units = shuffled(fe, random);
  std::vector<bool> dropped(static_cast<size_t>(fe), false);
  for (int64_t i = 0; i < count; ++i) dropped[static_cast<size_t>(units[static_cast<size_t>(i)])] = true;
  return dropped;
}

/// Statistics in fp64, summed in row-major order, however many rows are shown at a time.
void measure(const ShowSlice& slice, int64_t unit_dim, ExpertFacts& facts) {
  double squares = 0, sum = 0;
  int64_t count = 0, all = 0;
  const auto each = [&](auto action) {
    slice([&](int64_t first, const Tensor& block) {
      const int64_t rows = block.size(0), columns = block.size(1);
      const float* const data = block.const_data_ptr<float>();
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          action(static_cast<double>(data[r * columns + c]), facts.dropped[static_cast<size_t>(unit_dim == 0 ? first + r : c)]);
        }
      }
    });
  };
  each([&](double x, bool drop) {
    squares += x * x;
    ++all;
    if (drop) sum += x, ++count;
  });
  facts.rms = std::sqrt(squares / static_cast<double>(all));
  facts.measured = true;
  if (count == 0) return;
  facts.mean = sum / static_cast<double>(count);
  double spread = 0;
  each([&](double x, bool drop) {
    if (drop) spread += (x - facts.mean) * (x - facts.mean);
  });
  facts.deviation = std::sqrt(spread / static_cast<double>(count));
}

}  // namespace

void disturb(const ParameterSpec& spec, const Box& box, int64_t unit_dim, const Recipe& recipe, const ShowSlice& slice, const Tensor& target,
             ExpertFacts& facts) {
  const int64_t e = facts.expert, columns = spec.shape[2];
  if (!facts.measured) {
    facts.dropped = dropped_units(spec, e, spec.shape[static_cast<size_t>(1 + unit_dim)], recipe);
    measure(slice, unit_dim, facts);
  }
  const Random fresh(recipe.seed, spec.name + "/drop"), noise(recipe.seed, spec.name + "/noise");
  const Box of_expert{{e, box.begin[1], box.begin[2]}, {1, box.size[1], box.size[2]}};
  map_elements(spec.shape, of_expert, target.unsqueeze(0), [&](uint64_t index, float x) -> double {
    const uint64_t in_expert = index % static_cast<uint64_t>(spec.shape[1] * columns);
    const auto unit = static_cast<size_t>(unit_dim == 0 ? in_expert / columns : in_expert % columns);
    if (facts.dropped[unit]) return facts.mean + facts.deviation * fresh.normal(index);
    return recipe.noise > 0 ? x + recipe.noise * facts.rms * noise.normal(index) : x;
  });
}

}  // namespace upcycle
