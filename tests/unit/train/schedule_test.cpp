// The whole pipeline is played through, all stages at once, as train/pipeline.cpp does it: compute, then exchange all of a tick's messages.
#include "train/schedule.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <tuple>

namespace upcycle {
namespace {

using Key = std::tuple<int, int64_t, int>;
Key key(const Action& action) { return {static_cast<int>(action.pass), action.micro_batch, action.chunk}; }

struct Shape {
  int stages, virtual_stages;
  int64_t micro_batches;
  int chunks() const { return stages * virtual_stages; }
  /// Whether the action's input comes from no other stage.
  bool begins(const Action& action) const { return action.chunk == (action.pass == Pass::forward ? 0 : chunks() - 1); }
  /// Whose input the action's output is: of the next chunk, or, for a gradient, of the one before.
  std::optional<Action> follower(Action action) const {
    action.chunk += action.pass == Pass::forward ? 1 : -1;
    if (action.chunk < 0 || action.chunk == chunks()) return std::nullopt;
    return action;
  }
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  return out << shape.stages << " stages x " << shape.virtual_stages << ", " << shape.micro_batches << " micro-batches";
}

std::vector<StagePlan> plans(const Shape& shape, StagePlan (*plan)(int, int, int, int64_t) = one_forward_one_backward) {
  std::vector<StagePlan> all;
  for (int stage = 0; stage < shape.stages; ++stage) all.push_back(plan(stage, shape.stages, shape.virtual_stages, shape.micro_batches));
  return all;
}

std::vector<std::vector<Tick>> timetables(const std::vector<StagePlan>& plans) {
  std::vector<std::vector<Tick>> all;
  for (int stage = 0; stage < static_cast<int>(plans.size()); ++stage) all.push_back(timetable(plans, stage));
  return all;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int stages : {1, 2, 3, 4, 7, 8}) {
    for (const int virtual_stages : {1, 2, 3}) {
      if (stages == 1 && virtual_stages > 1) continue;
      for (const int64_t micro_batches : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23}) all.push_back({stages, virtual_stages, micro_batches});
    }
  }
  return all;
}

void play(const Shape& shape, bool backwards) {
  SCOPED_TRACE(testing::Message() << shape);
  const auto tables = timetables(plans(shape, backwards ? one_forward_one_backward : forward_only));
  std::vector<std::set<Key>> inputs(tables.size());   // arrived at a stage and not yet used
  std::set<Key> done;
  for (size_t now = 0; now < tables[0].size(); ++now) {
    std::map<std::pair<int, int>, std::vector<Key>> sent, received;   // (from, to) -> for which actions, in order
    for (int stage = 0; stage < shape.stages; ++stage) {
      ASSERT_EQ(tables[static_cast<size_t>(stage)].size(), tables[0].size());
      const Tick& tick = tables[static_cast<size_t>(stage)][now];
      std::set<Key> to_send;
      for (const Action& action : tick.actions) {
        EXPECT_EQ(action.chunk % shape.stages, stage);
        EXPECT_TRUE(done.insert(key(action)).second) << "done twice";
        EXPECT_EQ(inputs[static_cast<size_t>(stage)].erase(key(action)), shape.begins(action) ? 0u : 1u) << "computed before its input came";
        EXPECT_TRUE(action.pass == Pass::forward || done.contains({0, action.micro_batch, action.chunk}));
        if (shape.follower(action)) to_send.insert(key(action));
      }
      for (const Tick::Message& message : tick.sent) {
        EXPECT_EQ(to_send.erase(key(message.action)), 1u);
        const Action next = shape.follower(message.action).value();
        EXPECT_EQ(message.peer, next.chunk % shape.stages);
        EXPECT_NE(message.peer, stage);
        sent[{stage, message.peer}].push_back(key(next));
      }
      EXPECT_TRUE(to_send.empty()) << "an output that nobody gets";
      for (const Tick::Message& message : tick.received) received[{message.peer, stage}].push_back(key(message.action));
    }
    EXPECT_EQ(sent, received) << "tick " << now;
    for (const auto& [from_to, messages] : received) inputs[static_cast<size_t>(from_to.second)].insert(messages.begin(), messages.end());
  }
  EXPECT_EQ(static_cast<int64_t>(done.size()), (backwards ? 2 : 1) * shape.chunks() * shape.micro_batches);
  for (const auto& left : inputs) EXPECT_TRUE(left.empty());
}

TEST(Schedule, EveryMessageMeetsItsReceiverAndEveryChunkRunsOnce) {
  for (const Shape& shape : shapes()) {
    play(shape, true);
    play(shape, false);
  }
}

TEST(Schedule, ForwardsOfAChunkAndItsBackwardsAreInTheOrderOfTheMicroBatches) {
  for (const Shape& shape : shapes()) {
    for (const StagePlan& plan : plans(shape)) {
      std::map<std::pair<int, int>, int64_t> last;
      for (const Step& step : plan) {
        for (const Action& action : step) {
          const auto [at, fresh] = last.try_emplace({static_cast<int>(action.pass), action.chunk}, -1);
          EXPECT_EQ(action.micro_batch, at->second + 1);
          at->second = action.micro_batch;
        }
      }
    }
  }
}

int64_t most_in_flight(const StagePlan& plan) {
  int64_t now = 0, most = 0;
  for (const Step& step : plan) {
    for (const Action& action : step) most = std::max(most, now += action.pass == Pass::forward ? 1 : -1);
  }
  return most;
}

TEST(Schedule, ActivationsInFlightAreBounded) {
  for (const Shape& shape : shapes()) {
    for (int stage = 0; stage < shape.stages; ++stage) {
      const int64_t behind = shape.stages - 1 - stage, all = shape.micro_batches * shape.virtual_stages;
      const int64_t fill = shape.virtual_stages == 1 ? behind : 2 * behind + (shape.virtual_stages - 1) * shape.stages;
      const int64_t most = most_in_flight(one_forward_one_backward(stage, shape.stages, shape.virtual_stages, shape.micro_batches));
      EXPECT_LE(most, std::min(fill + 1, all)) << shape;
      if (shape.micro_batches % shape.stages == 0) {
        EXPECT_EQ(most, std::min(fill + 1, all)) << shape;
      }
    }
  }
}

TEST(Schedule, InputsDoNotPileUp) {
  for (const Shape& shape : shapes()) {
    for (const auto& table : timetables(plans(shape))) {
      int64_t waiting = 0;
      for (const Tick& tick : table) {
        for (const Action& action : tick.actions) waiting -= shape.begins(action) ? 0 : 1;
        waiting += static_cast<int64_t>(tick.received.size());
        EXPECT_LE(waiting, shape.virtual_stages == 1 ? 2 : 2 * shape.stages) << shape;
      }
    }
  }
}

// Seconds until all stages are done, when a forward takes 1, a backward 2, and a stage waits for all messages of its tick.
double seconds(const std::vector<std::vector<Tick>>& tables) {
  std::vector<double> clock(tables.size(), 0.0);
  for (size_t now = 0; now < tables[0].size(); ++now) {
    for (size_t stage = 0; stage < tables.size(); ++stage) {
      for (const Action& action : tables[stage][now].actions) clock[stage] += action.pass == Pass::forward ? 1 : 2;
    }
    const std::vector<double> ready = clock;
    for (size_t stage = 0; stage < tables.size(); ++stage) {
      for (const Tick::Message& message : tables[stage][now].received) {
        const auto from = static_cast<size_t>(message.peer);
        const double met = std::max(ready[stage], ready[from]);
        clock[stage] = std::max(clock[stage], met);
        clock[from] = std::max(clock[from], met);
      }
    }
  }
  return *std::max_element(clock.begin(), clock.end());
}

TEST(Schedule, TheBubbleIsThatOfTheFormula) {
  for (const int stages : {1, 2, 4, 8}) {
    for (const int virtual_stages : {1, 2, 4}) {
      if (stages == 1 && virtual_stages > 1) continue;
      for (const int rounds : {1, 2, 5}) {
        const Shape shape{stages, virtual_stages, int64_t{stages} * rounds};
        const double busy = 3.0 * static_cast<double>(shape.micro_batches) * virtual_stages;
        EXPECT_EQ(seconds(timetables(plans(shape))), busy + 3.0 * (stages - 1)) << shape;
      }
    }
  }
}

constexpr auto F = [](int64_t j, int chunk) { return Action{Pass::forward, j, chunk}; };
constexpr auto B = [](int64_t j, int chunk) { return Action{Pass::backward, j, chunk}; };

TEST(Schedule, ACircleIsRefused) {
  const StagePlan backward_first{{B(0, 0)}, {F(0, 0)}}, other{{F(0, 1)}, {B(0, 1)}};
  EXPECT_THROW(timetable({backward_first, other}, 0), std::logic_error);
}

TEST(Schedule, IsMegatrons) {
  EXPECT_EQ(one_forward_one_backward(0, 2, 1, 3), (StagePlan{{F(0, 0)}, {F(1, 0)}, {B(0, 0)}, {F(2, 0)}, {B(1, 0)}, {B(2, 0)}}));
  EXPECT_EQ(one_forward_one_backward(1, 2, 2, 2),
            (StagePlan{{F(0, 1)}, {F(1, 1)}, {F(0, 3), B(0, 3)}, {F(1, 3), B(1, 3)}, {B(0, 1)}, {B(1, 1)}}));
  EXPECT_EQ(one_forward_one_backward(0, 2, 2, 1), (StagePlan{{F(0, 0)}, {F(0, 2)}, {B(0, 2)}, {B(0, 0)}})) << "half a group";
}

}  // namespace
}  // namespace upcycle
