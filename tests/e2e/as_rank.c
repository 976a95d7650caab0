// A process as whoever starts it sees it; the work is done by one that the server at the socket ARGV[0].socket forks (rank_server.c). Ends as
// that one ends.
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int count, char** argv) {
  (void)count;
  struct sockaddr_un address = {AF_UNIX, {0}};
  snprintf(address.sun_path, sizeof address.sun_path, "%s.socket", argv[0]);
  const int server = socket(AF_UNIX, SOCK_STREAM, 0);
  int status = 0;
  if (connect(server, (struct sockaddr*)&address, sizeof address) != 0 || read(server, &status, sizeof status) != sizeof status) return 99;
  if (WIFSIGNALED(status)) kill(getpid(), WTERMSIG(status));
  return WEXITSTATUS(status);
}
