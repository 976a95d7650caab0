#include "base/log.hpp"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <spdlog/version.h>
#include <unistd.h>

#include <cstdio>
#include <mutex>

#include "base/error.hpp"

namespace upcycle::log {
namespace {

struct Output {
  spdlog::logger logger{"upcycle", std::make_shared<spdlog::sinks::stderr_color_sink_mt>()};
  std::string prefix;  // "rank 3: " on ranks other than 0
  std::mutex mutex;
  bool progress_shown = false;

  Output() {
    logger.set_pattern("%H:%M:%S %^%v%$");
    logger.set_level(spdlog::level::info);
    logger.flush_on(spdlog::level::debug);
  }

  void clear_progress() {
    if (!progress_shown) return;
    std::fputs("\r\033[K", stderr);
    std::fflush(stderr);
    progress_shown = false;
  }

  void line(spdlog::level::level_enum level, const char* kind, const std::string& message) {
    if (!logger.should_log(level)) return;
    const std::scoped_lock lock(mutex);
    clear_progress();
    logger.log(level, "{}{}{}", kind, prefix, message);
  }
};

Output& output() {
  static Output instance;
  return instance;
}

spdlog::level::level_enum threshold(Level level) {
  switch (level) {
    case Level::debug:
      return spdlog::level::debug;
    case Level::info:
      return spdlog::level::info;
    case Level::warning:
      return spdlog::level::warn;
    case Level::error:
      return spdlog::level::err;
    case Level::off:
      break;
  }
  return spdlog::level::off;
}

}  // namespace

Level level_from_name(const std::string& name) {
  if (name == "debug") return Level::debug;
  if (name == "info") return Level::info;
  if (name == "warning") return Level::warning;
  if (name == "error") return Level::error;
  if (name == "off") return Level::off;
  fail("unknown log level '", name, "': choose debug, info, warning, error or off");
}

void start(Level level, int rank) {
  Output& out = output();
  const std::scoped_lock lock(out.mutex);
  out.prefix = rank == 0 ? "" : text("rank ", rank, ": ");
  const auto least = rank == 0 ? level : std::max(level, Level::warning);
  out.logger.set_level(threshold(least));
}

void debug(const std::string& message) { output().line(spdlog::level::debug, "debug: ", message); }
void info(const std::string& message) { output().line(spdlog::level::info, "", message); }
void warning(const std::string& message) { output().line(spdlog::level::warn, "warning: ", message); }
void error(const std::string& message) { output().line(spdlog::level::err, "error: ", message); }

bool on_terminal() {
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  return terminal;
}

void progress(const std::string& line) {
  Output& out = output();
  if (!on_terminal() || !out.prefix.empty() || !out.logger.should_log(spdlog::level::info)) return;
  const std::scoped_lock lock(out.mutex);
  std::fprintf(stderr, "\r%s\033[K", line.c_str());
  std::fflush(stderr);
  out.progress_shown = true;
}

std::string library_version() {
  return text("spdlog ", SPDLOG_VER_MAJOR, ".", SPDLOG_VER_MINOR, ".", SPDLOG_VER_PATCH, " (fmt ", FMT_VERSION / 10000,
              ".", FMT_VERSION / 100 % 100, ".", FMT_VERSION % 100, ")");
}

}  // namespace upcycle::log
