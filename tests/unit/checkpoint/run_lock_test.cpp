#include "checkpoint/run_lock.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

#include "base/heartbeat.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

/// What a process that takes the lock of `directory` is told; in a process of its own, since flock belongs to one.
std::string other_process(const fs::path& directory) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    const std::string message = user_error([&] { RunLock{directory}; });
    _exit(write(ends[1], message.data(), message.size()) < 0);
  }
  close(ends[1]);
  std::string message(4096, '\0');
  const ssize_t size = read(ends[0], message.data(), message.size());
  message.resize(size > 0 ? static_cast<size_t>(size) : 0);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return message;
}

TEST(RunLock, OneJobADirectory) {
  const Scratch scratch;
  {
    const RunLock lock(scratch / "run");
    EXPECT_THAT(other_process(scratch / "run"),
                testing::AllOf(HasSubstr("another job"), HasSubstr("process " + std::to_string(getpid()))));
    EXPECT_EQ(other_process(scratch / "else"), "");
  }
  EXPECT_EQ(other_process(scratch / "run"), "");
  EXPECT_THAT(user_error([&] { RunLock{store(scratch / "file", "") / "below"}; }), HasSubstr("creating"));
}

TEST(RunLock, DeathLetsGo) {
  const Scratch scratch;
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    const RunLock lock(scratch.path());
    if (write(ends[1], "x", 1) != 1) _exit(1);
    pause();
  }
  char ready = 0;
  ASSERT_EQ(read(ends[0], &ready, 1), 1);
  EXPECT_THAT(user_error([&] { RunLock{scratch.path()}; }), HasSubstr("process " + std::to_string(child)));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_EQ(user_error([&] { RunLock{scratch.path()}; }), "");
}

TEST(RunLock, AnotherHostsYoungLockIsRespected) {
  const Scratch scratch;
  const auto holder = [&](const std::string& job, int start) {
    store(scratch / "lock", R"({"host":"node0815","pid":42,"since":"2026-01-01T00:00:00Z","job":")" + job +
                                R"(","start":)" + std::to_string(start) + "}");
  };
  const auto taken = [&] { return user_error([&] { RunLock{scratch.path()}; }); };
  holder("", 0);
  EXPECT_THAT(taken(), testing::AllOf(HasSubstr("process 42 on host node0815"), HasSubstr("wait 10 minutes or remove"),
                                      HasSubstr((scratch / "lock").string())));
  fs::last_write_time(scratch / "lock", fs::file_time_type::clock::now() - RunLock::kStale - std::chrono::seconds(2));
  EXPECT_EQ(taken(), "") << "an old lock of another host is that of a dead job";

  // A Slurm job that was requeued after its node died, on another node.
  setenv("SLURM_JOB_ID", "7", 1);
  setenv("SLURM_RESTART_COUNT", "1", 1);
  holder("8", 0);
  EXPECT_THAT(taken(), HasSubstr("node0815"));
  holder("7", 1);
  EXPECT_THAT(taken(), HasSubstr("node0815"));
  holder("7", 0);
  EXPECT_EQ(taken(), "");
  unsetenv("SLURM_JOB_ID");
  unsetenv("SLURM_RESTART_COUNT");

  // Its file server still keeps flock for the node that died.
  holder("7", 0);
  setenv("SLURM_JOB_ID", "7", 1);
  setenv("SLURM_RESTART_COUNT", "1", 1);
  const int kept = open((scratch / "lock").c_str(), O_RDWR);
  ASSERT_EQ(flock(kept, LOCK_EX | LOCK_NB), 0);
  EXPECT_EQ(taken(), "");
  close(kept);
  unsetenv("SLURM_JOB_ID");
  unsetenv("SLURM_RESTART_COUNT");

  for (const char* garbage : {"", "not JSON", "[]", R"({"host":5})"}) {
    store(scratch / "lock", garbage);
    EXPECT_EQ(taken(), "") << garbage;
  }
}

/// A lock, and the heartbeat of its holder, as another host's job leaves them.
void hold_elsewhere(const Scratch& scratch, int64_t count) {
  store(scratch / "lock", R"({"host":"node0815","pid":42,"since":"2026-01-01T00:00:00Z","job":"8","start":0})");
  fs::create_directories(scratch / "heartbeat");
  ASSERT_TRUE(write_heartbeat(scratch / "heartbeat", {0, true, {"node0815", 42, 7}, 17, "training", 0.5, count, 4, "node0815-42-7"}));
}

TEST(RunLock, ADeadJobOfAnotherHostIsFoundOut) {
  const Scratch scratch;
  hold_elsewhere(scratch, 3);
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  {
    const RunLock lock(scratch.path(), std::chrono::milliseconds(400));
    EXPECT_GE(seconds(), 0.4);
    EXPECT_FALSE(RunLock::is_free(scratch.path()));
    EXPECT_THAT(contents(scratch / "lock"), HasSubstr(std::to_string(getpid())));
  }
  EXPECT_TRUE(RunLock::is_free(scratch.path()));

  // The same where the file server keeps flock for it: the file is replaced.
  hold_elsewhere(scratch, 3);
  const int kept = open((scratch / "lock").c_str(), O_RDWR);
  ASSERT_EQ(flock(kept, LOCK_EX | LOCK_NB), 0);
  const RunLock lock(scratch.path(), std::chrono::milliseconds(400));
  EXPECT_THAT(other_process(scratch.path()), HasSubstr("process " + std::to_string(getpid())));
  close(kept);
}

TEST(RunLock, ALivingJobOfAnotherHostIsNamed) {
  const Scratch scratch;
  const auto taken = [&](auto give_sign) {
    hold_elsewhere(scratch, 3);
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      give_sign();
    });
    const std::string said = user_error([&] { RunLock(scratch.path(), std::chrono::seconds(30)); });
    other.join();
    return said;
  };
  const std::string by_heartbeat = taken([&] { write_heartbeat(scratch / "heartbeat", {0, true, {"node0815", 42, 7}, 17, "training", 0.5, 4, 4, "node0815-42-7"}); });
  EXPECT_THAT(by_heartbeat, HasSubstr("another job runs in this directory: process 42 on host node0815 (Slurm job 8), since 2026-01-01T00:00:00Z, whose last "
                                      "heartbeat says: step 17, training. It is alive. Stop that job, or choose another run.directory"));
  EXPECT_THAT(taken([&] { fs::last_write_time(scratch / "lock", fs::file_time_type::clock::now() - std::chrono::hours(1)); }), HasSubstr("It is alive"));
  EXPECT_EQ(taken([&] { store(scratch / "lock", ""); }), "") << "given back meanwhile";
}

TEST(RunLock, TouchKeepsItYoung) {
  const Scratch scratch;
  const RunLock lock(scratch.path());
  const auto old = fs::file_time_type::clock::now() - std::chrono::hours(1);
  fs::last_write_time(scratch / "lock", old);
  lock.touch();
  EXPECT_GT(fs::last_write_time(scratch / "lock"), old + std::chrono::minutes(50));
}

}  // namespace
}  // namespace upcycle
