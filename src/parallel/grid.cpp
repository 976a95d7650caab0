#include "parallel/grid.hpp"

#include "base/error.hpp"
#include "base/nearest.hpp"

namespace upcycle {
namespace {

constexpr std::array<const char*, kAxes> kNames = {"tensor", "context",     "data",    "pipeline", "expert_tensor",
                                                   "expert", "expert_data", "replica", "sequence"};

int positive(const char* key, int64_t degree, int world) {
  if (degree < 1) fail("parallel.", key, " = ", degree, ": a degree is at least 1");
  if (degree > world) fail("parallel.", key, " = ", degree, " is more than the ", world, " ranks of this run: ", world, " is the most");
  return static_cast<int>(degree);
}

struct Degree {
  const char* key;
  int64_t value;
};

/// Throws where the product of `degrees` does not divide `ranks` ("ranks of this run"), naming the nearest that would: of each degree, the
/// others left as they are, and of the ranks.
void demand_division(const std::vector<Degree>& degrees, int64_t ranks, const std::string& of_what) {
  int64_t product = 1, above_one = 0;
  std::string factors;
  for (const Degree& degree : degrees) {
    product *= degree.value;
    if (degree.value == 1) continue;
    factors += text(above_one++ == 0 ? "" : " x ", degree.key, " ", degree.value);
  }
  if (ranks % product == 0) return;
  std::string remedies;
  for (const Degree& degree : degrees) {
    const int64_t others = product / degree.value;
    const std::string near = nearest(degree.value, ranks / others, [&](int64_t d) { return ranks % (others * d) == 0; });
    if (degree.value == 1 || near.empty()) continue;
    remedies += text(above_one == 1 ? "" : text(degree.key, " "), near, " would, or ");
  }
  fail(factors, above_one == 1 ? "" : text(" = ", product), " does not divide the ", ranks, " ranks of ", of_what, ": ", remedies,
       nearest_multiples(ranks, product), " ranks");
}

}  // namespace

const char* name(Axis axis) noexcept { return kNames[static_cast<size_t>(axis)]; }

Grid::Grid(const ParallelSection& degrees, int world_size) : world_(world_size) {
  if (world_size < 1) fail("a run has at least one rank, not ", world_size);
  const int64_t tensor = positive("tensor", degrees.tensor, world_size);
  const int64_t context = positive("context", degrees.context, world_size);
  const int64_t pipeline = positive("pipeline", degrees.pipeline, world_size);
  const int64_t expert_tensor = positive("expert_tensor", degrees.expert_tensor, world_size);
  const int64_t expert = positive("expert", degrees.expert, world_size);

  demand_division({{"tensor", tensor}, {"context", context}, {"pipeline", pipeline}}, world_size, "this run");
  const int64_t data = world_size / (tensor * context * pipeline);
  const int64_t stage = tensor * context * data;
  demand_division({{"expert_tensor", expert_tensor}, {"expert", expert}}, stage,
                  text("a stage (tensor ", tensor, " x context ", context, " x data ", data, ")"));

  const auto set = [this](Axis axis, int64_t size, int64_t stride) {
    sizes_[static_cast<size_t>(axis)] = static_cast<int>(size);
    strides_[static_cast<size_t>(axis)] = static_cast<int>(stride);
  };
  set(Axis::tensor, tensor, 1);
  set(Axis::context, context, tensor);
  set(Axis::data, data, tensor * context);
  set(Axis::pipeline, pipeline, stage);
  set(Axis::expert_tensor, expert_tensor, 1);
  set(Axis::expert, expert, expert_tensor);
  set(Axis::expert_data, stage / (expert_tensor * expert), expert_tensor * expert);
  set(Axis::replica, context * data, tensor);  // context and data lie side by side, so together they are one axis
  set(Axis::sequence, tensor * context, 1);    // tensor and context likewise
}

Coordinates Grid::at(int rank) const noexcept {
  Coordinates here;
  for (size_t axis = 0; axis < kAxes; ++axis) here.at[axis] = rank / strides_[axis] % sizes_[axis];
  return here;
}

int Grid::rank(const Coordinates& here) const noexcept {
  int rank = 0;
  for (const Axis axis : {Axis::tensor, Axis::context, Axis::data, Axis::pipeline}) rank += here[axis] * strides_[static_cast<size_t>(axis)];
  return rank;
}

std::vector<int> Grid::peers(Axis axis, int rank) const {
  const int stride = strides_[static_cast<size_t>(axis)];
  const int first = rank - at(rank)[axis] * stride;
  std::vector<int> ranks(static_cast<size_t>(size(axis)));
  for (int i = 0; i < size(axis); ++i) ranks[static_cast<size_t>(i)] = first + i * stride;
  return ranks;
}

}  // namespace upcycle
