#include "parallel/every_layout.hpp"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <set>
#include <string>

#include "parallel/grid.hpp"
#include "support/layout_trials.hpp"

namespace upcycle {
namespace {

/// Ordered triples with product `number`: prod over primes p^k of (k + 1)(k + 2) / 2.
int64_t triples(int number) {
  int64_t count = 1;
  for (int prime = 2; number > 1; ++prime) {
    int64_t power = 0;
    while (number % prime == 0) number /= prime, ++power;
    count *= (power + 1) * (power + 2) / 2;
  }
  return count;
}

TEST(EveryLayout, IsListedOnce) {
  for (const int world : {1, 2, 3, 4, 6, 8, 12, 16, 32, 60}) {
    int64_t expected = 0;
    for (int pipeline = 1; pipeline <= world; ++pipeline) {
      if (world % pipeline != 0) continue;
      const int64_t factorings = triples(world / pipeline);  // (tensor, context, data), and (expert_tensor, expert, expert_data)
      expected += factorings * factorings * 2 * (pipeline > 1 ? 2 : 1);
    }
    const std::vector<ParallelSection> layouts = every_layout(world);
    EXPECT_EQ(static_cast<int64_t>(layouts.size()), expected) << world;
    std::set<std::array<int64_t, 7>> distinct;
    for (const ParallelSection& p : layouts) {
      EXPECT_NO_THROW(Grid(p, world));
      EXPECT_TRUE(p.virtual_stages == 1 || p.pipeline > 1);
      distinct.insert({p.tensor, p.context, p.pipeline, p.virtual_stages, p.expert, p.expert_tensor, p.zero});
    }
    EXPECT_EQ(distinct.size(), layouts.size()) << world;
  }
  EXPECT_EQ(every_layout(8).size(), 384U);
}

/// What a layout has more than one rank of, pipelines plain and interleaved, and what data-parallel ranks divide.
std::vector<std::string> axes_of(const ParallelSection& p, int world) {
  const std::string zero = p.zero ? " with ZeRO-1" : " without ZeRO";
  std::vector<std::string> out;
  if (p.tensor > 1) out.emplace_back("tensor");
  if (p.context > 1) out.emplace_back("context");
  if (p.pipeline > 1) out.emplace_back(p.virtual_stages > 1 ? "interleaved" : "pipeline");
  if (p.expert > 1) out.emplace_back("expert");
  if (p.expert_tensor > 1) out.emplace_back("expert_tensor");
  if (world > p.tensor * p.context * p.pipeline) out.push_back("data" + zero);
  if (world > p.expert * p.expert_tensor * p.pipeline) out.push_back("expert_data" + zero);
  return out;
}

// What tests/ranks/layouts_test.cpp trains.
TEST(LayoutTrials, EveryAxisMeetsEveryModelAndRecomputeMode) {
  for (const auto& [world, all] : {std::pair(4, false), std::pair(8, false), std::pair(8, true)}) {
    std::map<std::string, std::set<size_t>> models;
    std::map<std::string, std::set<Recompute>> modes;
    std::set<std::pair<size_t, Recompute>> pairs;
    for (const LayoutTrial& trial : layout_trials(world, all)) {
      pairs.emplace(trial.model, trial.recompute);
      for (const std::string& axis : axes_of(trial.layout, world)) models[axis].insert(trial.model), modes[axis].insert(trial.recompute);
    }
    EXPECT_EQ(models.size(), 10U) << world;
    for (const auto& [axis, met] : models) EXPECT_EQ(met.size(), kTinyModels) << axis << " of " << world << " ranks" << (all ? ", all layouts" : "");
    for (const auto& [axis, met] : modes) EXPECT_EQ(met.size(), 3U) << axis << " of " << world << " ranks" << (all ? ", all layouts" : "");
    EXPECT_EQ(pairs.size(), 3 * kTinyModels) << world;
  }
}

TEST(LayoutTrials, ThereAreMoreThan200WithoutBeingAskedForAll) {
  size_t trials = 0;
  for (const int world : {1, 2, 4, 8}) trials += layout_trials(world, false).size();
  EXPECT_GT(trials, 200U);
  EXPECT_EQ(layout_trials(8, true).size(), 382U) << "but for two of 16 chunks";
}

}  // namespace
}  // namespace upcycle
