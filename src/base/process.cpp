#include "base/process.hpp"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

namespace upcycle {
namespace {

struct Status {
  char state = 0;  // 0: no such process
  int64_t started = 0;
};

// proc(5): "pid (name) state ...", the start time is the 22nd field; a name may have blanks and brackets in it.
Status status_of(int64_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(file, line);
  const size_t bracket = line.rfind(')');
  Status status;
  if (bracket == std::string::npos) return status;
  std::istringstream fields(line.substr(bracket + 1));
  fields >> status.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> status.started;
  return status;
}

}  // namespace

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "?";
}

Process this_process() { return {host_name(), getpid(), status_of(getpid()).started}; }

Life life_of(const Process& process) {
  if (process.host != host_name()) return Life::unknown;
  const Status status = status_of(process.pid);
  if (status.state == 0 || status.state == 'Z' || status.state == 'X' || status.started != process.started) {
    return Life::gone;
  }
  return status.state == 'T' ? Life::stopped : Life::running;
}

void end_within(int seconds, int exit_code) {
  std::thread([=] {
    std::this_thread::sleep_for(std::chrono::seconds(seconds));
    _exit(exit_code);
  }).detach();
}

void end_heedless_launcher() noexcept {
  const char* recovers = std::getenv("OMPI_MCA_orte_enable_recovery");
  if (recovers && std::strcmp(recovers, "0") != 0 && std::strcmp(recovers, "false") != 0 && getppid() > 1) {
    kill(getppid(), SIGTERM);
  }
}

}  // namespace upcycle
