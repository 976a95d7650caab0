// For LD_PRELOAD: makes of a program a server of its starts. Loading LibTorch costs half a second of CPU before main() begins, and tests start
// programs some thousand times. Where $RANK_SERVER_AT is set, the process, instead of running main(), serves at that Unix socket until its
// standard input ends: for each process that connects (as_rank.c, which links nothing) it forks one that takes over its arguments, environment,
// directory and streams, and then runs main(). The two live and die together. Signals are not passed on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int (*main_function)(int, char**, char**);
typedef int (*start_function)(main_function, int, char**, void (*)(void), void (*)(void), void (*)(void), void*);

static void must(int holds, const char* what) {
  if (holds) return;
  perror(what);
  _exit(126);
}

/// The strings of /proc/PID/NAME, and a null pointer.
static char** strings_of(pid_t pid, const char* name) {
  char path[64], *text = NULL;
  snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  size_t size = 0, count = 0;
  for (ssize_t got = 1; got > 0; size += (size_t)got) {
    text = realloc(text, size + 65536);
    got = read(file, text + size, 65536);
    must(got >= 0, path);
  }
  close(file);
  for (size_t i = 0; i < size; ++i) count += text[i] == 0;
  char** strings = malloc((count + 1) * sizeof *strings);
  for (size_t i = 0; i < count; text += strlen(text) + 1) strings[i++] = text;
  strings[count] = NULL;
  return strings;
}

/// Becomes the process `rank` in all but its id.
static void become(pid_t rank, int* argc, char*** argv) {
  char path[64], *program = (*argv)[0];
  for (int stream = 0; stream < 3; ++stream) {
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)rank, stream);
    const int file = open(path, stream == 0 ? O_RDONLY : O_WRONLY | O_APPEND);
    must(file >= 0 && dup2(file, stream) == stream, path);
    if (file > 2) close(file);
  }
  snprintf(path, sizeof path, "/proc/%d/cwd", (int)rank);
  must(chdir(path) == 0, path);
  clearenv();
  for (char** entry = strings_of(rank, "environ"); *entry; ++entry) putenv(*entry);
  *argv = strings_of(rank, "cmdline");
  (*argv)[0] = program;
  for (*argc = 0; (*argv)[*argc]; ++*argc) {}
  void (*again)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "file_calls_start");   // it has read another environment
  if (again) again();
}

/// Returns in each process that is to run main().
static void serve(const char* at, int* argc, char*** argv) {
  struct sockaddr_un address = {AF_UNIX, {0}};
  snprintf(address.sun_path, sizeof address.sun_path, "%s.new", at);
  const int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  must(bind(server, (struct sockaddr*)&address, sizeof address) == 0 && listen(server, 64) == 0 && rename(address.sun_path, at) == 0, at);
  signal(SIGCHLD, SIG_IGN);
  for (;;) {
    struct pollfd any[] = {{server, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    if (poll(any, 2, -1) < 0) continue;
    if (any[1].revents) _exit(0);
    const int rank = accept4(server, NULL, NULL, SOCK_CLOEXEC);
    if (fork() != 0) {
      close(rank);
      continue;
    }
    close(server);
    signal(SIGCHLD, SIG_DFL);
    struct ucred peer = {0};
    socklen_t size = sizeof peer;
    getsockopt(rank, SOL_SOCKET, SO_PEERCRED, &peer, &size);
    const pid_t child = fork();
    if (child == 0) {
      close(rank);
      become(peer.pid, argc, argv);
      return;
    }
    struct pollfd either[] = {{rank, POLLIN, 0}, {(int)syscall(SYS_pidfd_open, child, 0), POLLIN, 0}};
    while (poll(either, 2, -1) < 0) {}
    if (!either[1].revents) kill(child, SIGKILL);   // the rank was killed
    int status = 0;
    waitpid(child, &status, 0);
    if (send(rank, &status, sizeof status, MSG_NOSIGNAL) < 0) _exit(0);
    _exit(0);
  }
}

/// Handlers run from the last to the first that was registered; what the libraries registered when they were loaded, before this one, is left
/// out: LibTorch's destructors touch all the memory that a fork shares.
static void leave(int status, void* unused) {
  (void)unused;
  fflush(NULL);
  _exit(status);
}

/// The C library's, which calls main(); by then all libraries are loaded.
int __libc_start_main(main_function program, int argc, char** argv, void (*init)(void), void (*fini)(void), void (*unload)(void), void* stack) {
  const start_function real = (start_function)dlsym(RTLD_NEXT, "__libc_start_main");
  const char* at = getenv("RANK_SERVER_AT");
  if (!at) return real(program, argc, argv, init, fini, unload, stack);
  serve(at, &argc, &argv);
  on_exit(leave, NULL);
  return real(program, argc, argv, init, fini, NULL, stack);
}
