#include "base/progress_watch.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;

/// A run's heartbeats of one moment, as ranks of another host write them.
std::vector<Heartbeat> beats(int ranks, int64_t step, const std::string& doing, int64_t count, const std::string& life = "a-1-1") {
  std::vector<Heartbeat> all;
  for (int rank = 0; rank < ranks; ++rank) all.push_back({rank, true, {"node7", 100 + rank, 5}, step, doing, 0.0, count, ranks, life});
  return all;
}

constexpr ProgressLimits kLimits{.start = 100, .step = 20, .checkpoint = 50};

/// What it says after so many looks, one a second, at `now(second)`.
template <class Now>
std::optional<std::string> after(ProgressWatch& watch, int seconds, Now now) {
  for (int second = 0; second < seconds; ++second) {
    watch.look(now(second), 1);
    if (const auto verdict = watch.verdict()) return verdict;
  }
  return std::nullopt;
}

TEST(ProgressWatch, EachPhaseHasItsOwnLimit) {
  ProgressWatch watch(kLimits);
  watch.look({}, 0);
  EXPECT_FALSE(after(watch, 30, [](int) { return std::vector<Heartbeat>{}; }));
  EXPECT_FALSE(watch.begun());
  EXPECT_FALSE(after(watch, 60, [](int s) { return beats(2, -1, "filling weights", s); }));
  EXPECT_TRUE(watch.begun());
  EXPECT_FALSE(after(watch, 100, [](int s) { return beats(2, 1 + s / 15, "training", 100 + s); })) << "a step every 15 s";
  EXPECT_FALSE(after(watch, 49, [](int s) { return beats(2, 8, "writing a checkpoint", 200 + s); }));
  EXPECT_FALSE(after(watch, 90, [](int s) { return beats(2, 8, "validating", 300 + s); }));
  const auto verdict = after(watch, 30, [](int s) { return beats(2, 9, "training", 400 + s); });
  ASSERT_TRUE(verdict);
  EXPECT_THAT(*verdict, HasSubstr("no step for more than 20 s (--step): all ranks are at step 9; quiet for longest: rank 0 (node7, pid 100, step 9, training"));
  EXPECT_EQ(watch.step(), 9);
}

TEST(ProgressWatch, ACheckpointAndAStartThatTakeTooLong) {
  ProgressWatch watch(kLimits);
  watch.look({}, 0);
  EXPECT_FALSE(after(watch, 2, [](int s) { return beats(2, 1, "training", s); }));
  EXPECT_THAT(after(watch, 60, [](int s) { return beats(2, 1, "writing a checkpoint", 10 + s); }).value_or(""),
              HasSubstr("writing a checkpoint for more than 50 s (--checkpoint): "));

  ProgressWatch start(kLimits);
  start.look({}, 0);
  EXPECT_THAT(after(start, 110, [](int s) { return s % 2 ? beats(2, -1, "filling weights", s) : beats(2, -1, "writing a checkpoint", s); }).value_or(""),
              HasSubstr("no first step for more than 100 s (--start): all ranks are at step -1"));
  ProgressWatch nobody(kLimits);
  nobody.look({}, 0);
  EXPECT_EQ(after(nobody, 110, [](int) { return std::vector<Heartbeat>{}; }).value_or(""), "no rank has begun within 100 s (--start)");
}

TEST(ProgressWatch, NamesTheSilentRank) {
  ProgressWatch watch(kLimits);
  watch.look({}, 0);
  EXPECT_FALSE(after(watch, 5, [](int s) { return beats(3, s, "training", s); }));
  const auto verdict = after(watch, 30, [](int s) {
    auto all = beats(3, 5, "training", 10 + s / 5);
    all[1].count = 10, all[1].process.host = "node8";
    return all;
  });
  ASSERT_TRUE(verdict);
  EXPECT_THAT(*verdict, HasSubstr("cut off from the run directory: rank 1 (node8, pid 101, step 5, training, no progress for 21.0 s"));
  EXPECT_THAT(*verdict, testing::Not(HasSubstr("rank 0")));
}

TEST(ProgressWatch, HeartbeatsOfAnEarlierStartAreNone) {
  ProgressWatch watch(kLimits);
  watch.look(beats(4, 70, "training", 99, "old"), 0);
  EXPECT_FALSE(after(watch, 90, [](int) { return beats(4, 70, "training", 99, "old"); }));
  EXPECT_FALSE(watch.begun());
  watch.look(beats(2, -1, "starting", 1, "new"), 1);
  EXPECT_TRUE(watch.begun());
  EXPECT_FALSE(watch.left());
  watch.look(beats(2, 6, "finished", 2, "new"), 1);
  EXPECT_TRUE(watch.left());
  EXPECT_FALSE(watch.verdict());

  ProgressWatch late(kLimits);   // begun before the watch: the next heartbeat tells
  late.look(beats(2, 3, "training", 7), 0);
  EXPECT_FALSE(late.begun());
  late.look(beats(2, 3, "training", 8), 5);
  EXPECT_TRUE(late.begun());
  late.look(beats(1, -1, "starting", 1, "again"), 10);   // started again by the same script, on fewer ranks
  EXPECT_FALSE(after(late, 95, [](int s) { return beats(1, -1, "starting", 2 + s, "again"); }));
  EXPECT_TRUE(after(late, 10, [](int s) { return beats(1, -1, "starting", 99 + s, "again"); }));
}

TEST(Heartbeats, OfOneStartOnly) {
  const Scratch scratch;
  EXPECT_TRUE(read_heartbeats(scratch.path()).empty());
  for (const Heartbeat& beat : beats(4, 9, "training", 5, "old")) ASSERT_TRUE(write_heartbeat(scratch.path(), beat));
  ASSERT_TRUE(write_heartbeat(scratch.path(), beats(3, 1, "training", 2, "new")[0]));
  ASSERT_TRUE(write_heartbeat(scratch.path(), beats(3, 1, "training", 2, "new")[2]));
  const std::vector<Heartbeat> all = read_heartbeats(scratch.path());
  ASSERT_EQ(all.size(), 3);
  EXPECT_TRUE(all[0].found && all[2].found);
  EXPECT_FALSE(all[1].found);
  EXPECT_EQ(all[1].rank, 1);
  EXPECT_EQ(all[2].life, "new");
}

}  // namespace
}  // namespace upcycle
