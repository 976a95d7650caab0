#include "cli/roll_call.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <thread>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

TEST(RollCall, WhoIsMissing) {
  using Names = std::vector<std::string>;
  const Names nodes = {"n1", "n1", "n2", "n2", "n3", "n3"};
  EXPECT_EQ(who_is_missing({"n1", "n1", "n2", "n2", "", ""}, nodes), "ranks 4,5 (node n3)");
  EXPECT_EQ(who_is_missing({"n1", "", "n2", "n2", "", ""}, nodes), "rank 1 (node n1) and ranks 4,5 (node n3)");
  EXPECT_EQ(who_is_missing({"", "n1", "", "n2", "", "n3"}, nodes), "rank 0 (node n1), rank 2 (node n2) and rank 4 (node n3)");
  // Slurm has dealt them out one by one: what it says is not where they are.
  EXPECT_EQ(who_is_missing({"n1", "n2", "n3", "n1", "", "n3"}, nodes), "rank 4; the others are on n1, n2 and n3");
  EXPECT_EQ(who_is_missing({"a", "", "a"}, {}), "rank 1; the others are on a");
}

void name_the_start() {
  setenv("PMIX_NAMESPACE", "test.1", 1);
  for (const char* name : {"SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"}) unsetenv(name);
}

/// What a process says that has called the roll as `rank` of `ranks` and waits alone.
void wait_alone(const std::filesystem::path& directory, int rank, int ranks) {
  name_the_start();
  const RollCall roll_call(0.3, rank, ranks, [&] { return directory; });
  std::this_thread::sleep_for(std::chrono::seconds(30));
}

TEST(RollCallDeathTest, NamesTheRanksThatDoNotAnswer) {
  const Scratch scratch;
  store(scratch / ".upcycle-check-test.1-rank-2", "n7");
  EXPECT_EXIT(wait_alone(scratch.path(), 0, 4), testing::ExitedWithCode(1), "2 of 4 ranks have not come within 0.3 s, nor answered in .*: ranks 1,3");
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path())) << "nothing is left";
}

TEST(RollCallDeathTest, WithoutAPlaceEachSpeaksForItself) {
  EXPECT_EXIT(wait_alone("", 3, 4), testing::ExitedWithCode(1), "rank 3 .* has waited 0.3 s for other ranks");
  EXPECT_EXIT(wait_alone("/proc", 3, 4), testing::ExitedWithCode(1), "rank 3 .* has waited 0.3 s for other ranks");
}

TEST(RollCallDeathTest, RanksThatAllAnswerAreNotAccused) {
  const Scratch scratch;
  store(scratch / ".upcycle-check-test.1-rank-1", "n7");
  EXPECT_EXIT(wait_alone(scratch.path(), 0, 2), testing::ExitedWithCode(1), "all 2 ranks are alive");
}

TEST(RollCallDeathTest, AnAnswerOfAnEarlierStartDoesNotCount) {
  const Scratch scratch;
  const auto old = store(scratch / ".upcycle-check-test.1-rank-1", "n7");
  std::filesystem::last_write_time(old, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  EXPECT_EXIT(wait_alone(scratch.path(), 0, 2), testing::ExitedWithCode(1), "1 of 2 ranks has not come");
}

TEST(RollCall, RanksThatMeetAreLeftAlone) {
  const Scratch scratch;
  {
    const RollCall roll_call(0.1, 0, 2, [&] { return scratch.path(); });
    RollCall::met();   // from now on they have a minute
    std::this_thread::sleep_for(std::chrono::milliseconds(600));
  }
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path())) << "nobody was called";
  RollCall::met();   // nobody waits
}

TEST(RollCall, RanksThatMeetWhileTheRollIsCalledTakeTheirAnswersBack) {
  const Scratch scratch;
  const std::filesystem::path mine = scratch / ".upcycle-check-test.1-rank-1";
  name_the_start();
  const RollCall roll_call(3, 1, 2, [&] { return scratch.path(); });
  while (!std::filesystem::exists(mine)) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  RollCall::met();
  for (int i = 0; i < 300 && std::filesystem::exists(mine); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_FALSE(std::filesystem::exists(mine));
}

}  // namespace
}  // namespace upcycle
