#include "parallel/grid.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <map>
#include <set>

#include "base/error.hpp"

namespace upcycle {
namespace {

constexpr Axis kAll[] = {Axis::tensor,        Axis::context, Axis::data,        Axis::pipeline,
                         Axis::expert_tensor, Axis::expert,  Axis::expert_data, Axis::replica, Axis::sequence};

ParallelSection degrees(int64_t tensor, int64_t context, int64_t pipeline, int64_t expert, int64_t expert_tensor = 1) {
  ParallelSection section;
  section.tensor = tensor;
  section.context = context;
  section.pipeline = pipeline;
  section.expert = expert;
  section.expert_tensor = expert_tensor;
  return section;
}

std::string refusal(const ParallelSection& section, int world) {
  try {
    Grid(section, world);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

struct Layout {
  int world;
  ParallelSection section;
};

class GridLayouts : public testing::TestWithParam<Layout> {};

TEST_P(GridLayouts, PeersOfEveryAxisPartitionTheWorld) {
  const auto& [world, section] = GetParam();
  const Grid grid(section, world);
  for (const Axis axis : kAll) {
    std::vector<int> seen(static_cast<size_t>(world), 0);
    for (int rank = 0; rank < world; ++rank) {
      const std::vector<int> peers = grid.peers(axis, rank);
      ASSERT_EQ(static_cast<int>(peers.size()), grid.size(axis)) << name(axis);
      const int place = grid.at(rank)[axis];
      ASSERT_EQ(peers[static_cast<size_t>(place)], rank) << name(axis) << ": ordered by the coordinate";
      if (place != 0) continue;
      for (const int peer : peers) {
        ASSERT_TRUE(peer >= 0 && peer < world);
        ++seen[static_cast<size_t>(peer)];
        ASSERT_EQ(grid.peers(axis, peer), peers) << name(axis) << ": all members see the same group";
      }
    }
    for (int rank = 0; rank < world; ++rank)
      ASSERT_EQ(seen[static_cast<size_t>(rank)], 1) << name(axis) << " of " << rank;
  }
}

TEST_P(GridLayouts, BothFactoringsAgreeWithTheirFormulas) {
  const auto& [world, section] = GetParam();
  const Grid grid(section, world);
  const int TP = grid.size(Axis::tensor), CP = grid.size(Axis::context), DP = grid.size(Axis::data);
  const int ETP = grid.size(Axis::expert_tensor), EP = grid.size(Axis::expert), EDP = grid.size(Axis::expert_data);
  const int PP = grid.size(Axis::pipeline);
  ASSERT_EQ(TP * CP * DP * PP, world);
  ASSERT_EQ(ETP * EP * EDP * PP, world);
  ASSERT_EQ(grid.size(Axis::replica), CP * DP);
  std::set<std::array<int, 4>> dense, expert;
  for (int rank = 0; rank < world; ++rank) {
    const Coordinates at = grid.at(rank);
    for (const Axis axis : kAll) ASSERT_TRUE(at[axis] >= 0 && at[axis] < grid.size(axis)) << name(axis);
    ASSERT_EQ(rank, at[Axis::tensor] + TP * (at[Axis::context] + CP * (at[Axis::data] + DP * at[Axis::pipeline])));
    ASSERT_EQ(rank, at[Axis::expert_tensor] +
                        ETP * (at[Axis::expert] + EP * (at[Axis::expert_data] + EDP * at[Axis::pipeline])));
    ASSERT_EQ(at[Axis::replica], at[Axis::context] + CP * at[Axis::data]);
    ASSERT_EQ(at[Axis::sequence], at[Axis::tensor] + TP * at[Axis::context]);
    dense.insert({at[Axis::tensor], at[Axis::context], at[Axis::data], at[Axis::pipeline]});
    expert.insert({at[Axis::expert_tensor], at[Axis::expert], at[Axis::expert_data], at[Axis::pipeline]});
  }
  ASSERT_EQ(static_cast<int>(dense.size()), world);
  ASSERT_EQ(static_cast<int>(expert.size()), world);
}

TEST_P(GridLayouts, PeersDifferAlongTheirAxisOnly) {
  const auto& [world, section] = GetParam();
  const Grid grid(section, world);
  const std::set<Axis> dense = {Axis::tensor, Axis::context, Axis::data, Axis::pipeline};
  const std::set<Axis> expert = {Axis::expert_tensor, Axis::expert, Axis::expert_data, Axis::pipeline};
  for (const auto& factoring : {dense, expert}) {
    for (const Axis axis : factoring) {
      for (const int rank : {0, world / 3, world - 1}) {
        for (const int peer : grid.peers(axis, rank)) {
          for (const Axis other : factoring) {
            if (other != axis)
              ASSERT_EQ(grid.at(peer)[other], grid.at(rank)[other]) << name(axis) << '/' << name(other);
          }
        }
      }
    }
  }
  for (const int rank :
       {0, world / 2, world - 1}) {  // a replica group holds one dense slice: same tensor rank, same stage
    for (const int peer : grid.peers(Axis::replica, rank)) {
      ASSERT_EQ(grid.at(peer)[Axis::tensor], grid.at(rank)[Axis::tensor]);
      ASSERT_EQ(grid.at(peer)[Axis::pipeline], grid.at(rank)[Axis::pipeline]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, GridLayouts,
                         testing::Values(Layout{1, degrees(1, 1, 1, 1)}, Layout{4, degrees(1, 1, 1, 4)},
                                         Layout{6, degrees(1, 1, 1, 3)}, Layout{8, degrees(2, 2, 1, 4)},
                                         Layout{12, degrees(3, 1, 2, 6)}, Layout{16, degrees(4, 1, 2, 2, 4)},
                                         Layout{96, degrees(2, 2, 3, 8, 2)}, Layout{512, degrees(4, 2, 4, 16, 2)},
                                         Layout{1000, degrees(5, 2, 4, 25)}, Layout{4096, degrees(8, 4, 8, 64)}));

// Every axis of every rank of a large run, against formulas of its own: who comes next along it, and that its groups are a partition.
void expect_right_everywhere(const Grid& grid) {
  const int TP = grid.size(Axis::tensor), CP = grid.size(Axis::context), ETP = grid.size(Axis::expert_tensor), EP = grid.size(Axis::expert);
  const int stage = grid.world() / grid.size(Axis::pipeline);
  const std::map<Axis, int> to_the_next = {{Axis::tensor, 1},           {Axis::context, TP}, {Axis::data, TP * CP},
                                           {Axis::pipeline, stage},     {Axis::replica, TP}, {Axis::expert_tensor, 1},
                                           {Axis::expert, ETP},         {Axis::expert_data, ETP * EP}, {Axis::sequence, 1}};
  std::vector<Coordinates> at;
  for (int rank = 0; rank < grid.world(); ++rank) at.push_back(grid.at(rank));
  for (const auto& [axis, step] : to_the_next) {
    std::vector<int> groups_of(static_cast<size_t>(grid.world()));
    for (int rank = 0; rank < grid.world(); ++rank) {
      if (at[static_cast<size_t>(rank)][axis] != 0) continue;
      const std::vector<int> group = grid.peers(axis, rank);
      ASSERT_EQ(static_cast<int>(group.size()), grid.size(axis)) << name(axis);
      for (size_t i = 0; i < group.size(); ++i) {
        ASSERT_EQ(group[i], rank + static_cast<int>(i) * step) << name(axis) << " of " << rank;
        ASSERT_EQ(at[static_cast<size_t>(group[i])][axis], static_cast<int>(i)) << name(axis) << " of " << rank;
        ++groups_of[static_cast<size_t>(group[i])];
      }
    }
    ASSERT_EQ(std::count(groups_of.begin(), groups_of.end(), 1), grid.world()) << name(axis) << ": each rank is in one group";
  }
  for (int rank = 0; rank < grid.world(); ++rank) {
    const Coordinates& here = at[static_cast<size_t>(rank)];
    ASSERT_EQ(rank, here[Axis::tensor] + TP * (here[Axis::context] + CP * here[Axis::data]) + stage * here[Axis::pipeline]);
    ASSERT_EQ(rank, here[Axis::expert_tensor] + ETP * (here[Axis::expert] + EP * here[Axis::expert_data]) + stage * here[Axis::pipeline]);
  }
}

TEST(Grid, ThousandsOfRanksTakeMilliseconds) {
  const std::vector<Layout> layouts = {{4096, degrees(8, 4, 8, 64)},       {4096, degrees(1, 1, 16, 256)},    {4096, degrees(4, 16, 2, 8, 8)},
                                       {4096, degrees(1, 1, 1, 1)},        {16384, degrees(8, 4, 16, 64)},    {16384, degrees(8, 16, 8, 128)},
                                       {16384, degrees(1, 1, 64, 64, 4)},  {16384, degrees(16, 2, 32, 8, 2)}, {16384, degrees(1, 1, 1, 16384)}};
  for (const auto& [world, section] : layouts) {
    const std::clock_t before = std::clock();
    expect_right_everywhere(Grid(section, world));
    const double milliseconds = 1e3 * static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
    EXPECT_LT(milliseconds, 500) << world << " ranks";   // of the processor's time; 10 to 30, so this is for slow machines
  }
}

TEST(Grid, RefusesWithTheNumbers) {
  EXPECT_EQ(refusal(degrees(3, 1, 1, 1), 8), "tensor 3 does not divide the 8 ranks of this run: 2 or 4 would, or 6 or 9 ranks");
  EXPECT_EQ(refusal(degrees(2, 1, 3, 1), 8),
            "tensor 2 x pipeline 3 = 6 does not divide the 8 ranks of this run: pipeline 2 or 4 would, or 6 or 12 ranks");
  EXPECT_EQ(refusal(degrees(2, 4, 4, 1), 16),
            "tensor 2 x context 4 x pipeline 4 = 32 does not divide the 16 ranks of this run: tensor 1 would, or context 2 would, or "
            "pipeline 2 would, or 32 ranks");
  EXPECT_EQ(refusal(degrees(3, 1, 5, 1), 8), "tensor 3 x pipeline 5 = 15 does not divide the 8 ranks of this run: 15 ranks")
      << "no single degree would mend it";
  EXPECT_EQ(refusal(degrees(1, 1, 1, 6), 8),
            "expert 6 does not divide the 8 ranks of a stage (tensor 1 x context 1 x data 8): 4 or 8 would, or 6 or 12 ranks");
  EXPECT_EQ(refusal(degrees(2, 1, 2, 4, 2), 8),
            "expert_tensor 2 x expert 4 = 8 does not divide the 4 ranks of a stage (tensor 2 x context 1 x data 2): "
            "expert_tensor 1 would, or expert 2 would, or 8 ranks");
  EXPECT_EQ(refusal(degrees(16, 1, 1, 1), 8), "parallel.tensor = 16 is more than the 8 ranks of this run: 8 is the most");
  EXPECT_EQ(refusal(degrees(1, 0, 1, 1), 8), "parallel.context = 0: a degree is at least 1");
  EXPECT_EQ(refusal(degrees(1, 1, int64_t{1} << 40, 1), 8),
            "parallel.pipeline = 1099511627776 is more than the 8 ranks of this run: 8 is the most");
  EXPECT_EQ(refusal(degrees(1, 1, 1, 1), 0), "a run has at least one rank, not 0");
}

TEST(Grid, KnowsWhoStandsWhere) {
  const Grid grid(degrees(2, 3, 2, 4), 48);
  for (int rank = 0; rank < 48; ++rank) EXPECT_EQ(grid.rank(grid.at(rank)), rank);
}

TEST(Grid, NamesItsAxes) {
  EXPECT_STREQ(name(Axis::tensor), "tensor");
  EXPECT_STREQ(name(Axis::expert_data), "expert_data");
  EXPECT_STREQ(name(Axis::replica), "replica");
}

}  // namespace
}  // namespace upcycle
