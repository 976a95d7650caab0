#pragma once
#include <string>

/// The process's logger. Rank 0 speaks for all; other ranks speak from `warning` on, with their rank in front.
/// Hides spdlog: its fmt and the one in LibTorch's include folder must never meet in one translation unit.
namespace upcycle::log {

enum class Level { debug, info, warning, error, off };

/// "debug", "info", "warning", "error", "off"; throws UserError on others.
Level level_from_name(const std::string& name);

/// Sets level and rank; before it is called, everything from `info` on is printed to stderr.
void start(Level level, int rank);

void debug(const std::string& message);
void info(const std::string& message);
void warning(const std::string& message);
void error(const std::string& message);

/// A line that overwrites itself on a terminal; nothing where stderr is not one. Ended by the next ordinary line.
void progress(const std::string& line);
/// True when `progress` shows something.
bool on_terminal();

/// "spdlog 1.10.0 (fmt 9.1.0)".
std::string library_version();

}  // namespace upcycle::log
