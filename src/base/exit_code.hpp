#pragma once

namespace upcycle {

/// Exit codes of every command.
inline constexpr int kExitDone = 0;
inline constexpr int kExitFault = 1;      ///< of the program or the machine
inline constexpr int kExitMistake = 2;    ///< of the user, before anything was allocated or overwritten
inline constexpr int kExitRequeue = 75;   ///< stopped on request, state saved: run me again

}  // namespace upcycle
