#include "base/watchdog.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>

#include "base/error.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

void sleep_seconds(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

struct Outcome {
  std::vector<int> status;  ///< of waitpid, per rank
  std::string said;         ///< all ranks' stderr
  double seconds = 0;
};

using Job = std::vector<Process>;

/// Runs `rank_main(rank, job)` in one process per rank, without MPI; a rank that comes back from it exits with 0. `meanwhile` runs here.
Outcome run_ranks(const Scratch& scratch, int ranks, const std::function<void(int, const Job&)>& rank_main,
                  const std::function<void(const Job&)>& meanwhile = [](const Job&) {}) {
  const std::filesystem::path said = scratch / "stderr";
  struct Introduction {
    std::atomic<int64_t> started, pid;
  };
  const size_t bytes = static_cast<size_t>(ranks) * sizeof(Introduction);
  auto* shared = static_cast<Introduction*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const auto meet = [&] {
    Job job;
    for (int rank = 0; rank < ranks; ++rank) {
      while (shared[rank].pid == 0) sleep_seconds(0.001);
      job.push_back({host_name(), shared[rank].pid, shared[rank].started});
    }
    return job;
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<pid_t> children;
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      const int file = open(said.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0644);
      dup2(file, STDERR_FILENO);
      shared[rank].started = this_process().started;
      shared[rank].pid = getpid();
      rank_main(rank, meet());
      _exit(0);
    }
    children.push_back(child);
  }
  meanwhile(meet());
  Outcome outcome;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    outcome.status.push_back(status);
  }
  munmap(shared, bytes);
  outcome.said = contents(said);
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return outcome;
}

bool left_with(int status, int code) { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
bool killed_by(int status, int signal) { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }
int64_t lines(const std::string& text) { return std::count(text.begin(), text.end(), '\n'); }
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// The one verdict file of a run directory.
std::string verdict(const Scratch& scratch) {
  std::string found;
  for (const auto& entry : std::filesystem::directory_iterator(scratch / "heartbeat")) {
    if (entry.path().filename().string().starts_with("verdict-")) found += contents(entry.path());
  }
  return found;
}

TEST(Watchdog, NamesTheRankThatTheOthersWaitFor) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 3, [&](int rank, const Job& job) {
    Watchdog dog(rank, job, 4);
    dog.watch(scratch.path());
    for (int64_t step = 0; step < 3; ++step) dog.beat(step);
    if (rank != 1) dog.beat(3, "summing gradients");  // and now they wait
    sleep_seconds(60);
  });
  for (const int status : outcome.status) EXPECT_TRUE(left_with(status, 1)) << status;
  EXPECT_EQ(lines(outcome.said), 1) << outcome.said;
  EXPECT_TRUE(has(outcome.said, "ends the job after 4 s without progress (step ")) << outcome.said;
  EXPECT_TRUE(has(outcome.said, "behind the others, which are at step 3: rank 1 (")) << outcome.said;
  EXPECT_TRUE(has(outcome.said, ", step 2, training, no progress for ")) << outcome.said;
  EXPECT_EQ(verdict(scratch), outcome.said);
  EXPECT_LT(outcome.seconds, 20);
}

TEST(Watchdog, AKilledProcessEndsAllLongBeforeTheTimeOut) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 3, [&](int rank, const Job& job) {
    Watchdog dog(rank, job, 3600);
    dog.watch(scratch.path());
    dog.beat(7);
    sleep_seconds(0.5);
    if (rank == 1) raise(SIGKILL);
    sleep_seconds(60);
  });
  for (const int rank : {0, 2}) EXPECT_TRUE(left_with(outcome.status[static_cast<size_t>(rank)], 1));
  EXPECT_TRUE(killed_by(outcome.status[1], SIGKILL));
  EXPECT_EQ(lines(outcome.said), 1) << outcome.said;
  EXPECT_TRUE(has(outcome.said, "ends the job: a process is gone: rank 1 (" + host_name() + ", pid ")) << outcome.said;
  EXPECT_LT(outcome.seconds, 30);
}

TEST(Watchdog, ADeadProcessIsNamedBeforeThereIsARunDirectory) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 3, [&](int rank, const Job& job) {
    const Watchdog dog(rank, job, 3600);
    sleep_seconds(0.5);
    if (rank == 0) raise(SIGKILL);
    sleep_seconds(60);
  });
  for (const int rank : {1, 2}) EXPECT_TRUE(left_with(outcome.status[static_cast<size_t>(rank)], 1));
  EXPECT_EQ(lines(outcome.said), 1) << outcome.said;
  EXPECT_TRUE(has(outcome.said, "watchdog: rank 1 ends the job: a process is gone: rank 0 (")) << outcome.said;
  EXPECT_LT(outcome.seconds, 30);
}

TEST(Watchdog, AStoppedProcessIsNamedAndEnded) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 2, [&](int rank, const Job& job) {
    Watchdog dog(rank, job, 2);
    dog.watch(scratch.path());
    dog.beat(7, rank == 0 ? "summing gradients" : "training");
    if (rank == 1) raise(SIGSTOP);
    sleep_seconds(60);
  });
  EXPECT_TRUE(left_with(outcome.status[0], 1));
  EXPECT_TRUE(killed_by(outcome.status[1], SIGKILL)) << outcome.status[1];
  EXPECT_TRUE(has(outcome.said, "after 2 s without progress (step 7, summing gradients): a process is stopped: rank 1 ("))
      << outcome.said;
}

TEST(Watchdog, ASuspendedJobGoesOn) {
  const Scratch scratch;
  const auto signal_all = [](const Job& job, int signal) {
    for (const Process& process : job) kill(static_cast<pid_t>(process.pid), signal);
  };
  const Outcome outcome = run_ranks(
      scratch, 2,
      [&](int rank, const Job& job) {
        Watchdog dog(rank, job, 2.5);
        dog.watch(scratch.path());
        for (int64_t step = 0; step < 20; ++step) {
          dog.beat(step);
          sleep_seconds(0.1);
        }
      },
      [&](const Job& job) {
        sleep_seconds(1);
        signal_all(job, SIGSTOP);
        sleep_seconds(4);
        signal_all(job, SIGCONT);
      });
  for (const int status : outcome.status) EXPECT_TRUE(left_with(status, 0)) << status;
  EXPECT_EQ(outcome.said, "");
  EXPECT_GT(outcome.seconds, 5);
}

TEST(Watchdog, DoesWhatIsLeftToDoButNotForEver) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 1, [&](int rank, const Job& job) {
    Watchdog dog(rank, job, 0.2, [&] {
      store(scratch / "last_act", "done");
      sleep_seconds(60);
    });
    dog.watch(scratch.path());
    sleep_seconds(60);
  });
  EXPECT_TRUE(left_with(outcome.status[0], 1));
  EXPECT_EQ(contents(scratch / "last_act"), "done");
  EXPECT_LT(outcome.seconds, 30);
}

TEST(Watchdog, LeavesThoseInPeaceWhoMakeProgress) {
  const Scratch scratch;
  const Outcome outcome = run_ranks(scratch, 2, [&](int rank, const Job& job) {
    Watchdog dog(rank, job, 2);
    dog.watch(scratch.path());
    for (int64_t step = 0; step < 10; ++step) {
      dog.beat(step);
      sleep_seconds(rank == 0 ? 0.1 : 0.3);  // the one that has finished is not taken for dead
    }
  });
  for (const int status : outcome.status) EXPECT_TRUE(left_with(status, 0)) << status;
  EXPECT_EQ(outcome.said, "");
  for (const int rank : {0, 1}) {
    const Heartbeat last = read_heartbeat(scratch / "heartbeat", rank);
    EXPECT_TRUE(last.found);
    EXPECT_EQ(last.step, 9);
    EXPECT_EQ(last.doing, "finished");
    EXPECT_GT(last.process.pid, 0);
    EXPECT_GT(last.count, 1);
  }
}

TEST(Watchdog, SpeaksAgainInTheNextRun) {
  const Scratch scratch;
  for (int run = 0; run < 2; ++run) {
    const Outcome outcome = run_ranks(scratch, 1, [&](int rank, const Job& job) {
      Watchdog dog(rank, job, 0.2);
      dog.watch(scratch.path());
      sleep_seconds(60);
    });
    EXPECT_TRUE(left_with(outcome.status[0], 1));
    EXPECT_EQ(lines(outcome.said), run + 1) << outcome.said;  // the file is appended to
  }
  EXPECT_EQ(lines(verdict(scratch)), 1);
}

TEST(Watchdog, FindsOutWhetherTheRunDirectoryIsShared) {
  const Scratch here, elsewhere;
  run_ranks(here, 3, [&](int rank, const Job& job) {
    Watchdog dog(rank, job, 60);
    dog.watch(rank == 2 ? elsewhere.path() : here.path());
    store(here / text("seen_by_", rank), dog.sees(0, rank == 2 ? 0.5 : 20) ? "yes" : "no");
    sleep_seconds(2);  // whoever leaves ends the others
  });
  EXPECT_EQ(contents(here / "seen_by_0"), "yes");
  EXPECT_EQ(contents(here / "seen_by_1"), "yes");
  EXPECT_EQ(contents(here / "seen_by_2"), "no");
}

TEST(Watchdog, RefusesAFolderItCannotWrite) {
  const Scratch scratch;
  store(scratch / "run/heartbeat", "a file, where the folder should be");
  Watchdog dog(0, {this_process()}, 10);
  EXPECT_THROW(dog.watch(scratch / "run"), UserError);
}

Sighting sighting(int rank, int64_t step, double quiet, double unchanged = 0, Life life = Life::unknown) {
  return {{rank, true, {"node", 100 + rank, 5}, step, "training", quiet, 7}, life, unchanged};
}

TEST(Accuse, TheDeadFirstThenTheStoppedTheSilentTheLaggardsTheQuiet) {
  std::vector<Sighting> ranks = {sighting(0, 5, 10), sighting(1, 4, 20), sighting(2, 5, 9)};
  EXPECT_EQ(accuse(ranks),
            "behind the others, which are at step 5: rank 1 (node, pid 101, step 4, training, no progress for 20.0 s)");
  ranks[1].beat.step = 5;
  EXPECT_EQ(accuse(ranks),
            "all ranks are at step 5; quiet for longest: rank 1 (node, pid 101, step 5, training, no progress for 20.0 s)");
  ranks[2].unchanged = 15;
  ranks[0].beat.found = false;
  EXPECT_EQ(accuse(ranks),
            "a process is gone, stopped, or cut off from the run directory: rank 0 (node, pid 100, no heartbeat yet), "
            "rank 2 (node, pid 102, step 5, training, no progress for 24.0 s)");
  ranks[1].life = Life::stopped;
  EXPECT_EQ(accuse(ranks), "a process is stopped: rank 1 (node, pid 101, step 5, training, no progress for 20.0 s)");
  ranks[2].life = Life::gone;
  EXPECT_EQ(accuse(ranks), "a process is gone: rank 2 (node, pid 102, step 5, training, no progress for 24.0 s)");
}

TEST(Accuse, ARunningProcessOfThisHostIsNotSilent) {
  EXPECT_TRUE(has(accuse({sighting(0, 5, 1, 9, Life::running), sighting(1, 5, 2)}), "quiet for longest: rank 0 ("));
}

TEST(Accuse, DoesNotListThousands) {
  std::vector<Sighting> ranks(4096);
  for (int rank = 0; rank < 4096; ++rank) ranks[static_cast<size_t>(rank)].beat.rank = rank;
  EXPECT_TRUE(has(accuse(ranks), "no heartbeat yet) and 4088 more")) << accuse(ranks);
  EXPECT_EQ(accuse({}), "");
}

TEST(Heartbeat, ComesBackAsItWasWrittenAndGarbageIsNone) {
  const Scratch scratch;
  ASSERT_TRUE(write_heartbeat(scratch.path(), {12, true, {"a host", 4, 5}, 6, "writing a checkpoint", 0.25, 8}));
  const Heartbeat beat = read_heartbeat(scratch.path(), 12);
  EXPECT_TRUE(beat.found);
  EXPECT_EQ(beat.process.host, "a host");
  EXPECT_EQ(beat.process.started, 5);
  EXPECT_EQ(beat.doing, "writing a checkpoint");
  EXPECT_EQ(beat.quiet, 0.25);
  EXPECT_EQ(beat.count, 8);
  store(scratch / "rank_00003", "step three\nhost\n");
  EXPECT_FALSE(read_heartbeat(scratch.path(), 3).found);
  EXPECT_FALSE(read_heartbeat(scratch.path(), 4).found);
  EXPECT_FALSE(write_heartbeat(scratch / "absent", {}));
}

TEST(Processes, AreRunningStoppedGoneOrElsewhere) {
  Process process = this_process();
  EXPECT_EQ(life_of(process), Life::running);
  ++process.started;  // a later process with the same number
  EXPECT_EQ(life_of(process), Life::gone);
  process.host = "elsewhere";
  EXPECT_EQ(life_of(process), Life::unknown);

  const pid_t child = fork();
  if (child == 0) {
    raise(SIGSTOP);
    _exit(0);
  }
  waitpid(child, nullptr, WUNTRACED);
  Process other{host_name(), child, 0};
  std::ifstream stat("/proc/" + std::to_string(child) + "/stat");
  std::string word;
  for (int field = 1; field <= 22; ++field) stat >> word;
  other.started = std::stoll(word);
  EXPECT_EQ(life_of(other), Life::stopped);
  kill(child, SIGKILL);
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT);
  EXPECT_EQ(life_of(other), Life::gone) << "a zombie";
  waitpid(child, nullptr, 0);
  EXPECT_EQ(life_of(other), Life::gone);
}

}  // namespace
}  // namespace upcycle
