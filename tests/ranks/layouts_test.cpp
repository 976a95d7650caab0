// Every layout trains the same model: each factoring of the ranks over tensor, context, pipeline (plain and interleaved), expert,
// expert_tensor and data with and without ZeRO-1 gives one rank's losses, gradient norms and parameters, in fp32 on the CPU.
// The run on one rank leaves its numbers in the build tree for the others (a CTest fixture).
// A fixed spread of the layouts is taken; with UPCYCLE_ALL_LAYOUTS=1 (tools/test --all-layouts) every one.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <iostream>

#include "support/reference.hpp"

namespace upcycle {
namespace {

TEST(Layouts, AllTrainTheSameModel) {
  const References references(at::kCPU);
  const std::vector<LayoutTrial> trials = layout_trials(world_size(), std::getenv("UPCYCLE_ALL_LAYOUTS") != nullptr);
  for (const LayoutTrial& trial : trials) {
    const std::vector<TinyModel> models = models_for(trial.layout);
    ASSERT_EQ(models.size(), kTinyModels);
    const TinyModel& model = models[trial.model];
    const auto start = std::chrono::steady_clock::now();
    RunConfig run = model.run;
    run.parallel = trial.layout;
    run.train.recompute = trial.recompute;
    const std::string what = text(model.name, ", ", describe(trial.layout), ", recompute ", static_cast<int>(trial.recompute));
    SCOPED_TRACE(what);
    const std::vector<std::string> problems = check_layout(run, model.architecture, world_size()).problems;
    ASSERT_TRUE(problems.empty()) << problems.front();
    expect_same(model, run, references.of(model));
    if (world_rank() == 0) {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      std::cout << text(what, ": ", std::round(seconds.count() * 100) / 100, " s\n") << std::flush;
    }
  }
  if (world_rank() == 0) {
    std::cout << text(trials.size(), " of ", every_layout(world_size()).size(), " layouts of ", world_size(), " ranks trained the same model\n");
  }
}

}  // namespace
}  // namespace upcycle
