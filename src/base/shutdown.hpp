#pragma once
#include <string>

/// The process's wish to stop. A signal handler sets a flag, nothing more; the trainer's ranks agree on it at a step's end.
namespace upcycle::shutdown {

/// From now on `signal_name` ("USR1", "USR2", "HUP", ...; UserError otherwise) and TERM set the flag.
void listen(const std::string& signal_name);

/// Sets the flag without a signal.
void request() noexcept;

/// True once one of the signals came, or request() was called.
bool requested() noexcept;

/// The number of the first signal that came, 0 before. For the log.
int signal() noexcept;

}  // namespace upcycle::shutdown
