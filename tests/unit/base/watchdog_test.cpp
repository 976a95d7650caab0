#include "base/watchdog.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>

#include "base/error.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

void sleep_seconds(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

struct Outcome {
  std::vector<int> status;  ///< of waitpid, per rank
  std::string said;         ///< all ranks' stderr
};

/// Runs `rank_main(rank)` in one process per rank, without MPI; a rank that comes back from it exits with 0.
Outcome run_ranks(const Scratch& scratch, int ranks, const std::function<void(int)>& rank_main) {
  const std::filesystem::path said = scratch / "stderr";
  std::vector<pid_t> children;
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      const int file = open(said.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0644);
      dup2(file, STDERR_FILENO);
      rank_main(rank);
      _exit(0);
    }
    children.push_back(child);
  }
  Outcome outcome;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    outcome.status.push_back(status);
  }
  outcome.said = contents(said);
  return outcome;
}

bool left_with(int status, int code) { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
int64_t lines(const std::string& text) { return std::count(text.begin(), text.end(), '\n'); }

TEST(Watchdog, NamesTheRankThatTheOthersWaitFor) {
  const Scratch scratch;
  const auto start = std::chrono::steady_clock::now();
  const Outcome outcome = run_ranks(scratch, 3, [&](int rank) {
    Watchdog dog(scratch.path(), rank, 3, 0.5);
    for (int64_t step = 0; step < 3; ++step) dog.beat(step);
    if (rank != 1) dog.beat(3, "summing gradients");  // and now they wait
    sleep_seconds(60);
  });
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const int status : outcome.status) EXPECT_TRUE(left_with(status, 1)) << status;
  EXPECT_EQ(lines(outcome.said), 1) << outcome.said;
  EXPECT_NE(outcome.said.find("made no progress for 0.5 s"), std::string::npos) << outcome.said;
  EXPECT_NE(outcome.said.find("behind the others, which are at step 3: rank 1 ("), std::string::npos) << outcome.said;
  EXPECT_NE(outcome.said.find("step 2, training"), std::string::npos) << outcome.said;
  EXPECT_EQ(contents(scratch / "heartbeat/timed_out"), outcome.said);
  EXPECT_LT(took, 20);
}

TEST(Watchdog, NamesAKilledProcess) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 2, [&](int rank) {
    Watchdog dog(scratch.path(), rank, 2, 2.5);
    dog.beat(7);
    sleep_seconds(0.2);
    if (rank == 1) raise(SIGKILL);
    sleep_seconds(60);
  });
  EXPECT_TRUE(left_with(outcome.status[0], 1));
  EXPECT_TRUE(WIFSIGNALED(outcome.status[1]));
  EXPECT_NE(outcome.said.find("its process is gone, stopped, or cut off from the run directory: rank 1 ("),
            std::string::npos)
      << outcome.said;
  EXPECT_EQ(outcome.said.find("rank 0 ("), std::string::npos) << outcome.said;
}

TEST(Watchdog, LeavesThoseInPeaceWhoMakeProgress) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 2, [&](int rank) {
    Watchdog dog(scratch.path(), rank, 2, 1.0);
    for (int64_t step = 0; step < 10; ++step) {
      dog.beat(step);
      sleep_seconds(0.2);
    }
  });
  for (const int status : outcome.status) EXPECT_TRUE(left_with(status, 0)) << status;
  EXPECT_EQ(outcome.said, "");
  for (const int rank : {0, 1}) {
    const Heartbeat last = read_heartbeat(scratch / "heartbeat", rank);
    EXPECT_TRUE(last.found);
    EXPECT_EQ(last.step, 9);
    EXPECT_EQ(last.doing, "finished");
    EXPECT_GT(last.pid, 0);
    EXPECT_LE(last.progress, last.alive);
  }
}

TEST(Watchdog, SpeaksAgainInTheNextRun) {
  const Scratch scratch;
  for (int run = 0; run < 2; ++run) {
    const Outcome outcome = run_ranks(scratch, 1, [&](int rank) {
      Watchdog dog(scratch.path(), rank, 1, 0.2);
      sleep_seconds(60);
    });
    EXPECT_TRUE(left_with(outcome.status[0], 1));
    EXPECT_EQ(lines(outcome.said), run + 1) << outcome.said;  // the file is appended to
  }
}

TEST(Watchdog, RefusesAFolderItCannotWrite) {
  const Scratch scratch;
  store(scratch / "run/heartbeat", "a file, where the folder should be");
  EXPECT_THROW(Watchdog(scratch / "run", 0, 1, 10), UserError);
}

Heartbeat heartbeat(int rank, int64_t step, double progress, double alive) {
  return {rank, true, "node", 100 + rank, step, "training", progress, alive};
}

TEST(Accuse, TheSilentFirstThenTheLaggardsThenTheOldest) {
  std::vector<Heartbeat> ranks = {heartbeat(0, 5, 90, 100), heartbeat(1, 4, 80, 100), heartbeat(2, 5, 91, 100)};
  EXPECT_EQ(
      accuse(ranks, 100, 10),
      "behind the others, which are at step 5: rank 1 (node, pid 101, step 4, training, last progress 20.0 s ago)");
  ranks[1].step = 5;
  EXPECT_EQ(accuse(ranks, 100, 10),
            "all ranks are at step 5; the oldest heartbeat is that of rank 1 (node, pid 101, step 5, "
            "training, last progress 20.0 s ago)");
  ranks[2].alive = 85;
  ranks[0] = Heartbeat{};
  EXPECT_EQ(accuse(ranks, 100, 10),
            "its process is gone, stopped, or cut off from the run directory: rank 0 (no heartbeat), "
            "rank 2 (node, pid 102, step 5, training, last progress 9.0 s ago)");
}

TEST(Accuse, DoesNotListThousands) {
  std::vector<Heartbeat> ranks(4096);
  for (int rank = 0; rank < 4096; ++rank) ranks[static_cast<size_t>(rank)].rank = rank;
  const std::string words = accuse(ranks, 100, 10);
  EXPECT_NE(words.find("rank 7 (no heartbeat) and 4088 more"), std::string::npos) << words;
}

TEST(ReadHeartbeat, GarbageIsNoHeartbeat) {
  const Scratch scratch;
  store(scratch / "rank_00003", "step three\nhost\n");
  EXPECT_FALSE(read_heartbeat(scratch.path(), 3).found);
  EXPECT_FALSE(read_heartbeat(scratch.path(), 4).found);
}

}  // namespace
}  // namespace upcycle
