// Every layout trains the same model: each factoring of the ranks over tensor, context, pipeline (plain and interleaved), expert,
// expert_tensor and data with and without ZeRO-1 gives one rank's losses, gradient norms and parameters, in fp32 on the CPU.
// The run on one rank leaves its numbers in the build tree for the others (a CTest fixture).
// A fixed spread of the layouts is taken; with UPCYCLE_ALL_LAYOUTS=1 (tools/test --all-layouts) every one.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <iostream>

#include "parallel/every_layout.hpp"
#include "support/reference.hpp"

namespace upcycle {
namespace {

constexpr size_t kSpread = 66;   // of the layouts of 8 ranks; all of those of fewer are taken

/// Recompute changes no number: its modes take turns.
RunConfig run_of(const TinyModel& m, const ParallelSection& layout, size_t turn) {
  RunConfig run = m.run;
  run.parallel = layout;
  run.train.recompute = std::array{Recompute::none, Recompute::selective, Recompute::full}[turn % 3];
  return run;
}

TEST(Layouts, AllTrainTheSameModel) {
  const References references(at::kCPU);
  const std::vector<ParallelSection> all = every_layout(world_size());
  const bool whole = world_size() < 8 || std::getenv("UPCYCLE_ALL_LAYOUTS");
  const size_t taken = whole ? all.size() : kSpread;
  size_t ran = 0, too_deep = 0;
  for (size_t i = 0; i < taken; ++i) {
    const ParallelSection& layout = all[i * all.size() / taken];
    const std::vector<TinyModel> models = models_for(layout);
    if (layout.pipeline * layout.virtual_stages > models[0].architecture.layers) {
      ++too_deep;
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    const size_t which = i / 2 % models.size();   // where all are taken, zero 0 and 1 of a layout follow one another
    const RunConfig run = run_of(models[which], layout, i / 2 / models.size());
    SCOPED_TRACE(text(models[which].name, ", ", describe(layout), ", recompute ", static_cast<int>(run.train.recompute)));
    const std::vector<std::string> problems = check_layout(run, models[which].architecture, world_size()).problems;
    ASSERT_TRUE(problems.empty()) << problems.front();
    expect_same(models[which], run, references.of(models[which]));
    ++ran;
    if (world_rank() == 0) {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      std::cout << text(models[which].name, ": ", describe(layout), ": ", std::round(seconds.count() * 100) / 100, " s\n") << std::flush;
    }
  }
  if (world_rank() == 0) {
    std::cout << text(ran, " of ", all.size(), " layouts of ", world_size(), " ranks trained the same model; ", too_deep,
                      " of those taken have more chunks than the model has layers\n");
  }
}

}  // namespace
}  // namespace upcycle
