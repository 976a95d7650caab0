#include "base/child_process.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cerrno>
#include <chrono>
#include <functional>

#include "base/error.hpp"

namespace upcycle {
namespace {

double seconds_of(const std::function<void()>& action) {
  const auto start = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void expect_no_child() {
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child, or a zombie, is left";
  EXPECT_EQ(errno, ECHILD);
}

std::string what_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(ChildProcess, AnswersLineByLine) {
  {
    ChildProcess child({"sed", "-u", "s/^/said: /"});
    for (const char* line : {"one", "", "three"}) {
      child.write_line(line);
      EXPECT_EQ(child.read_line(), std::string("said: ") + line);
    }
  }
  expect_no_child();
}

TEST(ChildProcess, LinesLongerThanAnyBuffer) {
  // It takes the whole line before it answers, as tools/tokens does: neither side waits for the other.
  ChildProcess child({"sed", "-u", "s/x$/y/"});
  const std::string line(1 << 19, 'x');   // sed -u reads byte by byte
  for (int i = 0; i < 2; ++i) {
    child.write_line(line);
    EXPECT_EQ(child.read_line(), line.substr(1) + "y");
  }
}

TEST(ChildProcess, OneThatEndsIsNamedWithItsLastWords) {
  const std::vector<std::string> command = {"sh", "-c", "read line; echo oops >&2; exit 3"};
  {
    ChildProcess child(command);
    child.write_line("hello");
    const std::string what = what_of([&] { child.read_line(); });
    EXPECT_NE(what.find("ended (exit code 3):\noops"), std::string::npos) << what;
    EXPECT_NE(what.find("sh -c"), std::string::npos) << what;
  }
  {
    ChildProcess child(command);
    child.write_line("hello");
    // Far more than fits into a pipe, to nobody: no SIGPIPE, an exception.
    const std::string what = what_of([&] { child.write_line(std::string(8 << 20, 'x')); });
    EXPECT_NE(what.find("exit code 3"), std::string::npos) << what;
  }
  {
    ChildProcess child({"sh", "-c", "kill -9 $$"});
    EXPECT_NE(what_of([&] { child.read_line(); }).find("signal 9"), std::string::npos);
  }
  expect_no_child();
}

TEST(ChildProcess, OneThatCanNotBeStarted) {
  EXPECT_THROW(ChildProcess({"/nowhere/at/all"}), UserError);
  EXPECT_NE(what_of([] { ChildProcess({"no-such-program-at-all"}); }).find("can't start no-such-program-at-all: No such file"), std::string::npos);
  expect_no_child();
}

TEST(ChildProcess, OneThatStaysIsEnded) {
  const double seconds = seconds_of([] { ChildProcess child({"sleep", "100"}); });
  EXPECT_LT(seconds, 10);
  EXPECT_GT(seconds, 1.5) << "it had time to leave by itself";
  expect_no_child();
}

TEST(ChildProcess, OneThatIsBusyWritingToStandardErrorIsNotStuck) {
  ChildProcess child({"sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' e >&2; read line; echo \"$line\""});
  child.write_line("still there");
  EXPECT_EQ(child.read_line(), "still there");
}

}  // namespace
}  // namespace upcycle
