#include "parallel/links.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>

namespace upcycle {
namespace {

TEST(Links, EveryNodeMeetsBothNeighboursAndNobodyIsInTwoPairsAtOnce) {
  EXPECT_TRUE(links::ring_rounds(1).empty());
  EXPECT_EQ(links::ring_rounds(2), (std::vector<std::vector<std::pair<int, int>>>{{{0, 1}}}));
  for (const int nodes : {3, 4, 5, 8, 9, 64, 65}) {
    const auto rounds = links::ring_rounds(nodes);
    EXPECT_EQ(rounds.size(), nodes % 2 == 0 ? 2 : 3);
    std::map<int, std::set<int>> met;
    for (const auto& round : rounds) {
      std::set<int> busy;
      for (const auto& [a, b] : round) {
        EXPECT_TRUE(busy.insert(a).second && busy.insert(b).second);
        EXPECT_TRUE(met[a].insert(b).second && met[b].insert(a).second);
      }
    }
    for (int node = 0; node < nodes; ++node) EXPECT_EQ(met[node], (std::set<int>{(node + 1) % nodes, (node + nodes - 1) % nodes}));
  }
}

}  // namespace
}  // namespace upcycle
