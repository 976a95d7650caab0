// A rank as mpirun sees it; the work is done by a process that the server at $RANK_SERVER forks (rank_server.hpp). Ends as that one ends.
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void) {
  struct sockaddr_un address = {AF_UNIX, {0}};
  strncpy(address.sun_path, getenv("RANK_SERVER"), sizeof address.sun_path - 1);
  const int server = socket(AF_UNIX, SOCK_STREAM, 0);
  int status = 0;
  if (connect(server, (struct sockaddr*)&address, sizeof address) != 0 || read(server, &status, sizeof status) != sizeof status) return 99;
  if (WIFSIGNALED(status)) kill(getpid(), WTERMSIG(status));
  return WEXITSTATUS(status);
}
