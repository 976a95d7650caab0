#include "cli/sweep_jobs.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <set>
#include <string_view>
#include <thread>

#include "base/error.hpp"
#include "base/shutdown.hpp"
#include "cli/gpu_slots.hpp"

namespace upcycle {
namespace {

using Clock = std::chrono::steady_clock;

struct Running {
  size_t arm, slot;
  Clock::time_point since;
};

/// This process's environment, with `gpus` as CUDA_VISIBLE_DEVICES unless empty.
std::vector<std::string> environment_with(const std::string& gpus) {
  constexpr const char* kName = "CUDA_VISIBLE_DEVICES=";
  std::vector<std::string> lines;
  for (char** line = environ; *line; ++line) {
    if (gpus.empty() || !std::string_view(*line).starts_with(kName)) lines.emplace_back(*line);
  }
  if (!gpus.empty()) lines.push_back(kName + gpus);
  return lines;
}

/// As exec wants them; the pointers are into `words`.
std::vector<char*> pointers_to(std::vector<std::string>& words) {
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  return pointers;
}

/// The new process's id; 0 when it can't be started, which its log then says.
pid_t start(const SweepJob& job, const std::string& gpus) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, job.log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0666);
  posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  posix_spawnattr_setpgroup(&attributes, 0);
  std::vector<std::string> words = job.command, lines = environment_with(gpus);
  pid_t pid = 0;
  const int error = posix_spawnp(&pid, words.front().c_str(), &actions, &attributes, pointers_to(words).data(), pointers_to(lines).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error == 0) return pid;
  std::ofstream(job.log, std::ios::app) << "can't start " << job.command.front() << ": " << std::strerror(error) << "\n";
  return 0;
}

int code_of(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

}  // namespace

bool run_jobs(const std::vector<SweepJob>& jobs, size_t at_once, const std::function<void(const SweepJob&)>& started,
              const std::function<void(const JobEnd&)>& ended) {
  std::deque<SweepJob> waiting(jobs.begin(), jobs.end());
  std::map<pid_t, Running> running;
  std::set<size_t> free_slots;
  for (size_t slot = 0; slot < at_once; ++slot) free_slots.insert(slot);
  const std::vector<std::string> gpus = visible_gpus();
  bool asked = false;
  while (!running.empty() || (!waiting.empty() && !asked)) {
    if (!asked && shutdown::requested()) {
      asked = true;
      for (const auto& [pid, job] : running) kill(pid, SIGUSR2);   // to the launcher, which hands it to its ranks
    }
    while (!asked && !waiting.empty() && running.size() < at_once) {
      const SweepJob job = std::move(waiting.front());
      waiting.pop_front();
      started(job);
      if (const pid_t pid = start(job, gpus_of_slot(gpus, at_once, *free_slots.begin()))) {
        running.emplace(pid, Running{job.arm, free_slots.extract(free_slots.begin()).value(), Clock::now()});
      } else {
        ended({job.arm, 127, 0, false});
      }
    }
    int status = 0;
    const pid_t pid = waitpid(-1, &status, WNOHANG);
    if (const auto job = running.find(pid); pid > 0 && job != running.end()) {
      const JobEnd end{job->second.arm, code_of(status), std::chrono::duration<double>(Clock::now() - job->second.since).count(), asked};
      free_slots.insert(job->second.slot);
      running.erase(job);
      ended(end);
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  return asked;
}

std::string what_went_wrong(const std::filesystem::path& log) {
  constexpr size_t kMost = 6;
  std::ifstream file(log);
  std::vector<std::string> last, said;   // of all lines; since the program's last message
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line.starts_with("---")) continue;
    if (line.starts_with("upcycle: ") || line.starts_with("watchdog: ")) said = {line};
    else if (!said.empty() && said.size() < kMost && line.starts_with("  ")) said.push_back(line);
    last.push_back(line);
    if (last.size() > kMost) last.erase(last.begin());
  }
  std::string out;
  for (const std::string& line : said.empty() ? last : said) out += "    " + line + "\n";
  return out;
}

}  // namespace upcycle
