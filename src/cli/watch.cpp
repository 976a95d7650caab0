#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <thread>

#include "base/error.hpp"
#include "base/progress_watch.hpp"
#include "checkpoint/run_lock.hpp"
#include "cli/command.hpp"

namespace upcycle {
namespace {

using Seconds = std::chrono::duration<double>;

int left(const std::filesystem::path& directory, const ProgressWatch& watch) {
  std::cout << "upcycle watch: " << directory.string() << ": the run has left at step " << watch.step() << std::endl;
  return kExitDone;
}

}  // namespace

int run_watch(const Arguments& arguments) {
  const std::filesystem::path directory = arguments.positional.at(0);
  if (std::filesystem::exists(directory) && !std::filesystem::is_directory(directory)) fail(directory.string(), " is not a directory");
  const ProgressLimits& limits = arguments.watch;
  const double pause = std::clamp(std::min({limits.start, limits.step, limits.checkpoint}) / 20, 0.1, 5.0);
  ProgressWatch watch(limits);
  for (auto before = std::chrono::steady_clock::now();; std::this_thread::sleep_for(Seconds(pause))) {
    // What the watcher has slept through, with a suspended job, is nobody's silence: hence the bound.
    const auto now = std::chrono::steady_clock::now();
    watch.look(read_heartbeats(directory / "heartbeat"), std::min(Seconds(now - before).count(), 1 + 4 * pause));
    before = now;
    if (watch.left() || (watch.begun() && RunLock::is_free(directory))) return left(directory, watch);
    const auto verdict = watch.verdict();
    if (!verdict) continue;
    if (!watch.begun() && std::filesystem::exists(directory / "finished")) return left(directory, watch);   // before the first look
    std::cerr << text("upcycle watch: ", directory.string(), ": ", *verdict, "\n") << std::flush;
    return kExitFault;
  }
}

}  // namespace upcycle
