#pragma once
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "support/scratch.hpp"

// Starting a process that links LibTorch costs half a second of CPU before main() begins, and a crash test starts some 600. A server has
// that behind it: for each rank that mpirun starts (as_rank.c, which links nothing) it forks a process that takes over the rank's arguments,
// environment, directory and output, and has its own MPI_Init. The two live and die together.

namespace upcycle {

/// "a\0b\0c\0" -> {"a", "b", "c"}
inline std::vector<std::string> parts_of(const std::string& joined) {
  std::vector<std::string> out;
  for (size_t at = 0; at < joined.size(); at += out.back().size() + 1) out.emplace_back(joined.c_str() + at);
  return out;
}

/// Becomes the process `rank` in all but its id, and runs `body`.
template <class Body>
[[noreturn]] void become(pid_t rank, Body&& body) {
  const std::string of = "/proc/" + std::to_string(rank);
  for (const int stream : {1, 2}) dup2(open((of + "/fd/" + std::to_string(stream)).c_str(), O_WRONLY), stream);
  if (chdir((of + "/cwd").c_str()) != 0) _exit(126);
  clearenv();
  for (const std::string& entry : parts_of(contents(of + "/environ"))) putenv(strdup(entry.c_str()));
  std::vector<std::string> words = parts_of(contents(of + "/cmdline"));
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  if (auto* again = reinterpret_cast<void (*)()>(dlsym(RTLD_DEFAULT, "file_calls_start"))) again();   // it has read another environment
  std::exit(body(static_cast<int>(words.size()), arguments.data()));
}

/// Serves at the Unix socket `path` until it is killed; `body` is what main() would do. For a process without further threads.
template <class Body>
[[noreturn]] void serve_ranks(const char* path, Body&& body) {
  sockaddr_un address{AF_UNIX, {}};
  std::strncpy(address.sun_path, path, sizeof address.sun_path - 1);
  const int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (bind(server, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || listen(server, 64) != 0) throw std::runtime_error(path);
  std::signal(SIGCHLD, SIG_IGN);
  for (;;) {
    const int rank = accept4(server, nullptr, nullptr, SOCK_CLOEXEC);
    if (fork() != 0) {
      close(rank);
      continue;
    }
    close(server);
    std::signal(SIGCHLD, SIG_DFL);
    ucred peer{};
    socklen_t size = sizeof peer;
    getsockopt(rank, SOL_SOCKET, SO_PEERCRED, &peer, &size);
    const pid_t child = fork();
    if (child == 0) {
      close(rank);
      become(peer.pid, body);
    }
    pollfd either[] = {{rank, POLLIN, 0}, {static_cast<int>(syscall(SYS_pidfd_open, child, 0)), POLLIN, 0}};
    while (poll(either, 2, -1) < 0) {}
    if (!either[1].revents) kill(child, SIGKILL);   // mpirun has killed the rank
    int status = 0;
    waitpid(child, &status, 0);
    if (send(rank, &status, sizeof status, MSG_NOSIGNAL) < 0) _exit(0);
    _exit(0);
  }
}

}  // namespace upcycle
