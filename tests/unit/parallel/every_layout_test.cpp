#include "parallel/every_layout.hpp"

#include <gtest/gtest.h>

#include <array>
#include <set>

#include "parallel/grid.hpp"

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

}  // namespace
}  // namespace upcycle
