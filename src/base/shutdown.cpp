#include "base/shutdown.hpp"

#include <atomic>
#include <csignal>
#include <utility>

#include "base/error.hpp"

namespace upcycle::shutdown {
namespace {

std::atomic<int> first_signal = 0;
std::atomic<bool> asked = false;
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may only touch lock-free atomics");

extern "C" void note_signal(int number) {
  int none = 0;
  first_signal.compare_exchange_strong(none, number);
}

constexpr std::pair<const char*, int> kSignals[] = {{"USR1", SIGUSR1}, {"USR2", SIGUSR2}, {"HUP", SIGHUP},
                                                    {"INT", SIGINT},   {"ALRM", SIGALRM}, {"XCPU", SIGXCPU},
                                                    {"TERM", SIGTERM}};

void catch_signal(int number) {
  struct sigaction action = {};
  action.sa_handler = note_signal;
  action.sa_flags = SA_RESTART;  // system calls under way (reads, MPI's polls) go on as if nothing had happened
  sigemptyset(&action.sa_mask);
  if (sigaction(number, &action, nullptr) != 0) throw std::runtime_error(text("cannot listen to signal ", number));
}

}  // namespace

void listen(const std::string& signal_name) {
  for (const auto& [name, number] : kSignals) {
    if (signal_name != name) continue;
    catch_signal(number);
    catch_signal(SIGTERM);
    return;
  }
  fail("run.signal = \"", signal_name, "\": choose USR1, USR2, HUP, INT, ALRM, XCPU or TERM");
}

void request() noexcept { asked = true; }

bool requested() noexcept { return asked || first_signal.load() != 0; }

int signal() noexcept { return first_signal.load(); }

}  // namespace upcycle::shutdown
