#include "train/layout_check.hpp"

#include <numeric>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/nearest.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

int64_t smallest_world(const ParallelSection& degrees) {
  // Experts span the ranks of one stage, so a stage is the smallest common multiple of both factorings.
  const int64_t stage = std::lcm(degrees.tensor * degrees.context, degrees.expert * degrees.expert_tensor);
  return stage * degrees.pipeline;
}

LayoutCheck check_layout(const RunConfig& run, const Architecture& architecture, int world) {
  LayoutCheck check;
  const auto collect = [&](const auto& action) {
    try {
      action();
    } catch (const UserError& error) {
      check.problems.push_back(error.what());
    }
  };
  collect([&] { check.grid.emplace(run.parallel, world); });
  if (!check.grid) return check;
  const Grid& grid = *check.grid;
  collect([&] { check_divides(architecture, grid); });
  collect([&] { make_layout(architecture, grid, run.parallel); });

  const int64_t data = grid.size(Axis::data), batch = run.train.global_batch, micro = run.train.micro_batch;
  if (batch % (micro * data) != 0) {
    check.problems.push_back(text("train.global_batch = ", batch, " is not a multiple of train.micro_batch = ", micro,
                                  " times the ", data,
                                  " data-parallel ranks: every rank needs the same number of micro-batches; ",
                                  nearest_multiples(batch, micro * data), " would do"));
  }
  // Context parallelism gives each rank two chunks (an early and a late one, for balance); sequence parallelism cuts
  // them again.
  const int64_t tensor = grid.size(Axis::tensor), context = grid.size(Axis::context);
  const int64_t pieces = tensor * (context > 1 ? 2 * context : 1);
  if (run.train.sequence % pieces != 0) {
    check.problems.push_back(text("train.sequence = ", run.train.sequence, " is not a multiple of ", pieces,
                                  " (tensor ", tensor, context > 1 ? text(" x 2 x context ", context) : "", "): ",
                                  nearest_multiples(run.train.sequence, pieces), " would be"));
  }
  return check;
}

void refuse_what_does_not_divide(const RunConfig& run, const Architecture& architecture, int world) {
  const std::vector<std::string> problems = check_layout(run, architecture, world).problems;
  if (problems.empty()) return;
  fail("the run does not divide on ", world, " ranks:", listed(problems));
}

std::string describe(const Grid& grid) {
  std::string out;
  for (const Axis axis : {Axis::tensor, Axis::context, Axis::pipeline, Axis::data, Axis::expert, Axis::expert_tensor}) {
    if (grid.size(axis) > 1) out += text(out.empty() ? "" : ", ", name(axis), " ", grid.size(axis));
  }
  return out.empty() ? "one rank" : out;
}

}  // namespace upcycle
