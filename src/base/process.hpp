#pragma once
#include <cstdint>
#include <string>

namespace upcycle {

/// A process on some host, so that another process can find out what became of it.
struct Process {
  std::string host;
  int64_t pid = 0;
  int64_t started = 0;  ///< clock ticks from the host's boot to its start: tells it from a later process with its pid
};

std::string host_name();
Process this_process();

enum class Life { running, stopped, gone, unknown };
/// From /proc, at once. `unknown` for a process of another host; a zombie is gone; one that a signal has stopped is stopped (one
/// that a debugger holds is running).
Life life_of(const Process&);

/// This process ends in `seconds`, whatever its threads wait for by then.
void end_within(int seconds, int exit_code);

/// Open MPI's `mpirun --enable-recovery` takes no notice of dead ranks and returns 0 whatever they return. Asks such a launcher
/// to end (TERM), whereupon it ends what is left of the job and returns 1. Leaves every other launcher alone.
void end_heedless_launcher() noexcept;

}  // namespace upcycle
