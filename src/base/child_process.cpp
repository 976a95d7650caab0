#include "base/child_process.hpp"

#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <thread>

#include "base/error.hpp"

namespace upcycle {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : " ") + word;
  return out;
}

/// The last lines of what was written into `descriptor`.
std::string last_words(int descriptor) {
  constexpr off_t kMost = 2000;
  const off_t size = lseek(descriptor, 0, SEEK_END), begin = std::max<off_t>(0, size - kMost);
  std::string words(static_cast<size_t>(size - begin), '\0');
  const ssize_t got = pread(descriptor, words.data(), words.size(), begin);
  words.resize(got > 0 ? static_cast<size_t>(got) : 0);
  while (!words.empty() && words.back() == '\n') words.pop_back();
  return words;
}

std::string describe_end(int status) {
  if (WIFEXITED(status)) return text("exit code ", WEXITSTATUS(status));
  return WIFSIGNALED(status) ? text("signal ", WTERMSIG(status)) : text("status ", status);
}

}  // namespace

ChildProcess::ChildProcess(std::vector<std::string> command) : command_(std::move(command)) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) fail("can't start ", joined(command_), ": ", std::strerror(errno));
  socket_ = ends[0];
  errors_ = memfd_create("standard error", MFD_CLOEXEC);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, errors_, STDERR_FILENO);
  std::vector<char*> arguments;
  for (std::string& word : command_) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const int error = posix_spawnp(&pid_, arguments.front(), &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (error == 0) return;
  close(socket_);
  close(errors_);
  fail("can't start ", joined(command_), ": ", std::strerror(error));
}

ChildProcess::~ChildProcess() {
  close(socket_);
  wait_or_kill(2);
  close(errors_);
}

int ChildProcess::wait_or_kill(double seconds) noexcept {
  if (pid_ < 0) return 0;
  int status = 0;
  pid_t ended = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while ((ended = waitpid(pid_, &status, WNOHANG)) == 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  if (ended == 0) {
    kill(pid_, SIGKILL);
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) continue;
  }
  pid_ = -1;
  return status;
}

void ChildProcess::fail_ended() {
  shutdown(socket_, SHUT_RDWR);
  const int status = wait_or_kill(2);
  const std::string words = last_words(errors_);
  throw std::runtime_error(text(joined(command_), " ended (", describe_end(status), ")", words.empty() ? "" : ":\n", words));
}

void ChildProcess::write_line(std::string line) {
  line += '\n';
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t now = send(socket_, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (now >= 0) {
      sent += static_cast<size_t>(now);
    } else if (errno != EINTR) {
      fail_ended();
    }
  }
}

std::string ChildProcess::read_line() {
  size_t searched = 0;
  while (true) {
    const size_t end = read_.find('\n', searched);
    if (end != std::string::npos) {
      std::string line = read_.substr(0, end);
      read_.erase(0, end + 1);
      return line;
    }
    searched = read_.size();
    char block[1 << 16];
    const ssize_t now = recv(socket_, block, sizeof block, 0);
    if (now > 0) {
      read_.append(block, static_cast<size_t>(now));
    } else if (now == 0 || errno != EINTR) {
      fail_ended();
    }
  }
}

}  // namespace upcycle
